"""What the plugin refuses to start with, since no test has been through it or it cannot work."""

from __future__ import annotations

from typing import Any

from reft_core.errors import UnsupportedFeature, UnsupportedModel
from reft_core.vllm.layers import PROVED_MODEL_TYPES
from reft_core.vllm.settings import Settings, Unproved

PINNED = "0.32"
"""The only minor release of vLLM whose insides the plugin knows."""
_PARALLEL_SITES = ("block_output", "attn_output", "mlp_output")
"""Sites whose states every tensor-parallel rank has whole."""


def check_version() -> None:
    """Raise :class:`UnsupportedFeature` unless the installed vLLM is the pinned minor release."""
    from vllm.version import __version__

    if __version__.split("+")[0].rpartition(".")[0] != PINNED:
        raise UnsupportedFeature(
            f"vllm: got {__version__}, expected {PINNED}.*, whose insides the reft plugin changes; "
            "VLLM_PLUGINS without 'reft' starts it without the plugin",
            field="vllm",
        )


def check_config(config: Any, settings: Settings) -> None:
    """Raise unless the plugin's edits are right under this ``VllmConfig``."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    impossible = {
        "speculative decoding": config.speculative_config is not None,
        "sequence parallelism": parallel.use_sequence_parallel_moe or parallel.enable_hc_sp,
        "context parallelism": parallel.prefill_context_parallel_size > 1
        or parallel.decode_context_parallel_size > 1,
        "micro-batches (DBO)": parallel.use_ubatching,
        "an encoder-decoder model": config.model_config.is_encoder_decoder,
        "a pooling model": config.model_config.runner_type != "generate",
        "fast prefill by shared KV": config.cache_config.kv_sharing_fast_prefill,
        "a full CUDA graph of prefills": config.compilation_config.cudagraph_mode is not None
        and config.compilation_config.cudagraph_mode.mixed_mode().name == "FULL",
    }
    for what, is_asked in impossible.items():
        if is_asked:
            raise UnsupportedFeature(f"the reft plugin does not work with {what}", field="vllm")
    unproved: dict[Unproved, bool] = {
        "async_scheduling": bool(scheduler.async_scheduling),
        "v2_runner": bool(config.use_v2_model_runner),
        "cuda": config.device_config.device_type != "cpu",
        "architecture": config.model_config.hf_text_config.model_type not in PROVED_MODEL_TYPES,
        "kv_connector": config.kv_transfer_config is not None,
    }
    for name, is_asked in unproved.items():
        if is_asked and name not in settings.allow_unproved:
            raise UnsupportedFeature(_unproved(name, config), field="allow_unproved")
    if parallel.tensor_parallel_size > 1:
        for site in settings.sites:
            if site not in _PARALLEL_SITES:
                raise UnsupportedFeature(
                    f"sites: got {site!r}, expected {', '.join(_PARALLEL_SITES)} under tensor "
                    "parallelism, where no rank has the others' states whole",
                    field="sites",
                )


def _unproved(name: Unproved, config: Any) -> str:
    how = {
        "async_scheduling": "--no-async-scheduling turns it off",
        "v2_runner": "VLLM_USE_V2_MODEL_RUNNER=0 takes the other model runner",
        "cuda": "on a CPU it has been",
        "architecture": f"of {config.model_config.hf_text_config.model_type!r}, the proved ones "
        f"being {', '.join(PROVED_MODEL_TYPES)}",
        "kv_connector": "one that looks prompts up by their tokens alone gives one adapter's keys "
        "and values to another",
    }
    return (
        f"the reft plugin has not been tested with {name} ({how[name]}); "
        f'--additional-config \'{{"reft": {{"allow_unproved": ["{name}"]}}}}\' starts it anyway'
    )


def check_reduced(site: str, model: Any, module: Any) -> None:
    """Raise :class:`UnsupportedModel` if a tensor-parallel rank has only its part of a site."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    for part in module.modules():
        if isinstance(part, RowParallelLinear) and part.tp_size > 1 and not part.reduce_results:
            raise UnsupportedModel(f"{type(model).__name__}: {site} is spread over the ranks")
