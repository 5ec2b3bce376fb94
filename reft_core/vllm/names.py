"""Adapters as model names of vLLM's OpenAI server.

A request whose ``model`` is an adapter's name is one for the base model with that adapter. Answers
carry the base model's name.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from reft_core.errors import AdapterNotFound, InvalidRequest, ReftError
from reft_core.vllm.admission import CATALOG
from reft_core.vllm.catalog import Catalog
from reft_core.vllm.request import KEY, from_extra_args


def with_adapters(check_model: Any) -> Any:
    """``BaseServing._check_model`` that turns an adapter's name into ``vllm_xargs``, and refuses
    what no adapter can be used for."""

    @wraps(check_model)
    async def check(serving: Any, request: Any) -> Any:
        catalog = _catalog_of(serving)
        name = getattr(request, "model", None) or ""
        try:
            if not serving.models.is_base_model(name) and _is_known(catalog, name):
                _ask_for(request, name)
            if catalog is not None:
                _check_use(request, catalog)
        except ReftError as error:
            return serving.create_error_response(error.message, param=error.field)
        return await check_model(serving, request)

    return check


def supporting_adapters(is_supported: Any) -> Any:
    """``BaseServing._is_model_supported`` that is true of adapters' names too."""

    @wraps(is_supported)
    def supported(serving: Any, model_name: str | None) -> bool:
        if is_supported(serving, model_name):
            return True
        return _is_known(_catalog_of(serving), model_name or "")

    return supported


def listing_adapters(show: Any) -> Any:
    """``OpenAIServingModels.show_available_models`` with a card for each adapter."""

    @wraps(show)
    async def show_with_adapters(models: Any) -> Any:
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        found = await show(models)
        catalog = getattr(models.input_processor, CATALOG)
        found.data.extend(
            ModelCard(
                id=name,
                root=digest,
                parent=models.base_model_paths[0].name,
                permission=[ModelPermission()],
            )
            for name, digest in catalog.names().items()
        )
        return found

    return show_with_adapters


def _is_known(catalog: Catalog | None, name: str) -> bool:
    if catalog is None or not name:
        return False
    try:
        catalog.resolve(name)
    except AdapterNotFound:
        return False
    return True


def _catalog_of(serving: Any) -> Catalog | None:
    return getattr(getattr(serving.models, "input_processor", None), CATALOG, None)


def _ask_for(request: Any, name: str) -> None:
    """Have a request whose model is an adapter's name use the adapter. Idempotent."""
    if not hasattr(request, "vllm_xargs"):
        kind = type(request).__name__
        raise InvalidRequest.because("model", name, f"the base model, an adapter is none to {kind}")
    given = (request.vllm_xargs or {}).get(KEY, name)
    if given != name:
        raise InvalidRequest.because(f"vllm_xargs.{KEY}", given, f"none beside the model {name!r}")
    request.vllm_xargs = {**(request.vllm_xargs or {}), KEY: name}


def _check_use(request: Any, catalog: Catalog) -> None:
    """Raise :class:`ReftError` if an adapter that a request names cannot be used for it."""
    wanted = from_extra_args(getattr(request, "vllm_xargs", None)).adapters
    if wanted and getattr(request, "use_beam_search", False):
        raise InvalidRequest(
            "use_beam_search: beams begin anew at every token, and would move the positions that "
            "an adapter edits",
            field="use_beam_search",
        )
    if not (hasattr(request, "messages") or hasattr(request, "input")):
        return
    for want in wanted:
        spec = catalog.find(want.digest or catalog.resolve(want.name or "")).spec
        if spec.template is not None:
            raise InvalidRequest(
                f"model: {spec.name!r} was trained with a chat template of its own, which this "
                "server does not know; send the prompt as text to /v1/completions",
                field="model",
            )
