"""The door of vLLM: each request's adapters are checked and resolved before any worker sees them.

What fails here fails for its sender alone. A worker that met a wrong shape would take the whole
engine with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

from reft_core.adapter import Adapter
from reft_core.batch import PromptEdits
from reft_core.engine.choices import as_use
from reft_core.engine.interface import AdapterChoice
from reft_core.engine.provenance import Provenance
from reft_core.errors import InvalidRequest, ReftError, UnsupportedFeature
from reft_core.vllm import admitted
from reft_core.vllm.admitted import Admitted, Use, runs_of
from reft_core.vllm.catalog import Catalog
from reft_core.vllm.guard import check_config
from reft_core.vllm.request import KEY, Asked, Wanted, from_extra_args
from reft_core.vllm.settings import Settings

CATALOG = "reft_catalog"
"""Attribute of vLLM's ``InputProcessor`` that holds the :class:`Catalog`."""


def admit(
    catalog: Catalog, wanted: Sequence[Wanted], prompt_len: int, *, reads_all: bool = False
) -> Admitted | None:
    """The adapters of one request on a prompt of this length; None if they change nothing.

    ``reads_all``: log-probabilities of the whole prompt are wanted. Raises :class:`ReftError`.
    """
    found: dict[str, Adapter] = {}
    choices = []
    for want in wanted:
        digest = want.digest or catalog.resolve(want.name or "")
        found[digest] = catalog.find(digest)
        choices.append(AdapterChoice(digest, want.strength, want.subspaces))
    uses = tuple(as_use(choice, found) for choice in choices)
    edits = PromptEdits(uses, prompt_len, "all" if reads_all else "last")
    active = tuple(
        Use(use.adapter.digest, use.strength, use.subspaces) for _, use in edits.active()
    )
    if not active:
        return None
    return Admitted(active, runs_of(Provenance.of(edits, prompt_len).marks), prompt_len)


def catalog_of(engine: Any) -> Catalog:
    """The catalog of a vLLM engine or server, by the ``InputProcessor`` it has.

    Raises :class:`UnsupportedFeature` if the plugin is not armed there.
    """
    found = getattr(getattr(engine, "input_processor", None), CATALOG, None)
    if found is None:
        raise UnsupportedFeature("vllm: the reft plugin is not armed; see VLLM_PLUGINS")
    assert isinstance(found, Catalog)
    return found


def with_catalog(init: Any) -> Any:
    """``InputProcessor.__init__`` that refuses what is unproved and makes the catalog."""

    @wraps(init)
    def initialise(processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_config(vllm_config, Settings.of(vllm_config))
        init(processor, vllm_config, *args, **kwargs)
        setattr(processor, CATALOG, Catalog(vllm_config))

    return initialise


def with_admission(process_inputs: Any) -> Any:
    """``InputProcessor.process_inputs`` that admits the adapters of each request."""

    @wraps(process_inputs)
    def process(
        processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.exceptions import VLLMValidationError

        try:
            asked = _asked(params)
        except ReftError as error:
            raise VLLMValidationError(error.message, parameter=error.field) from None
        request = process_inputs(processor, request_id, prompt, params, *args, **kwargs)
        # The copy that vLLM made of the caller's params.
        extra_args = getattr(request.sampling_params, "extra_args", None) or {}
        if KEY not in extra_args:
            return request
        try:
            result = _admit(getattr(processor, CATALOG), asked, request) if asked.adapters else None
        except ReftError as error:
            raise VLLMValidationError(error.message, parameter=error.field) from None
        rest = {k: v for k, v in extra_args.items() if k != KEY}
        request.sampling_params.extra_args = rest | (result.to_extra_args() if result else {})
        return request

    return process


def _admit(catalog: Catalog, asked: Asked, request: Any) -> Admitted | None:
    """:func:`admit` for one of vLLM's requests."""
    _check_plain(request)
    reads_all = request.sampling_params.prompt_logprobs is not None
    return admit(catalog, asked.adapters, _prompt_len(asked, request), reads_all=reads_all)


def _prompt_len(asked: Asked, request: Any) -> int:
    """Tokens that count as the prompt: all of them, unless the request says fewer."""
    num_tokens = len(request.prompt_token_ids)
    if asked.prompt_len is not None and asked.prompt_len > num_tokens:
        raise InvalidRequest.because(
            f"{KEY}.prompt_len", asked.prompt_len, f"at most the {num_tokens} tokens given"
        )
    return asked.prompt_len or num_tokens


def _asked(params: Any) -> Asked:
    extra_args: Mapping[str, Any] | None = getattr(params, "extra_args", None)
    if extra_args and admitted.KEY in extra_args:
        raise InvalidRequest.because(
            f"extra_args.{admitted.KEY}", "a value", f"none; adapters are named under {KEY!r}"
        )
    return from_extra_args(extra_args)


def _check_plain(request: Any) -> None:
    """Raise :class:`InvalidRequest` for what positions and keys are not defined for."""
    wrong = {
        "prompt_embeds": request.prompt_token_ids is None or request.prompt_embeds is not None,
        "multi_modal_data": bool(request.mm_features),
        "lora_request": request.lora_request is not None,
        "resumable": request.resumable,
    }
    for field, is_there in wrong.items():
        if is_there:
            raise InvalidRequest.because(field, "a value", "none in a request with reft adapters")
