"""The base model and the engine of the settings: the one place that tells engines apart."""

from __future__ import annotations

from reft_core.classification import EncoderEngine
from reft_core.engine.interface import AdapterHost
from reft_core.errors import InvalidRequest
from reft_core.loading import (
    DEFAULT_CACHE,
    DEMO_MODEL,
    LoadedModel,
    load_encoder,
    load_model,
    load_skeleton,
    model_kind,
    model_path,
    read_config,
)
from server.settings import Settings


def load_base_model(settings: Settings) -> LoadedModel:
    """The base model that the settings name: a causal model, or an encoder without its head. Where
    vLLM loads the weights, they are not loaded here.

    Raises :class:`UnsupportedModel`, and :class:`InvalidRequest` for one that the engine cannot
    serve.
    """
    name, cache = settings.model, settings.cache_dir or DEFAULT_CACHE
    is_encoder = name != DEMO_MODEL and model_kind(read_config(name, field="model")) == "encoder"
    if settings.engine == "vllm":
        from reft_core.vllm.arguments import require_vllm

        require_vllm()
        if is_encoder:
            raise InvalidRequest.because(
                "engine", "vllm", f"'embedded', since {name} is an encoder, which vLLM does not run"
            )
        return load_skeleton(name, cache=cache)
    device, dtype = settings.resolve_device()
    if is_encoder:
        return load_encoder(name, dtype=dtype, device=device)
    return load_model(name, dtype=dtype, device=device, cache=cache)


def build_engine(settings: Settings, loaded: LoadedModel) -> AdapterHost:
    """The engine over a loaded model, not started.

    vLLM's processes begin here, and take a minute. Raises :class:`InvalidRequest` and
    :class:`UnsupportedModel` where they refuse.
    """
    config = settings.engine_config()
    if settings.engine == "vllm":
        from reft_core.vllm.engine import VllmEngine

        path = model_path(settings.model, settings.cache_dir or DEFAULT_CACHE)
        dtype = settings.resolve_device()[1]
        return VllmEngine(loaded, path, dtype, config, settings.vllm_options())
    if model_kind(loaded.model.config) == "encoder":
        return EncoderEngine(loaded, config)
    from reft_core.engine.engine import EmbeddedEngine

    return EmbeddedEngine(loaded, config)
