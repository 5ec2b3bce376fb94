"""What the plugin refuses to start with, each by its name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from reft_core.errors import InvalidRequest, UnsupportedFeature
from reft_core.vllm.guard import check_config
from reft_core.vllm.settings import Settings, Unproved

MIXED = SimpleNamespace(mixed_mode=lambda: SimpleNamespace(name="FULL"))
GOOD: dict[str, Any] = {
    "speculative_config": None,
    "use_v2_model_runner": False,
    "kv_transfer_config": None,
    "parallel_config.use_sequence_parallel_moe": False,
    "parallel_config.enable_hc_sp": False,
    "parallel_config.prefill_context_parallel_size": 1,
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.use_ubatching": False,
    "parallel_config.tensor_parallel_size": 1,
    "scheduler_config.async_scheduling": False,
    "compilation_config.cudagraph_mode": None,
    "model_config.is_encoder_decoder": False,
    "model_config.runner_type": "generate",
    "model_config.hf_text_config.model_type": "llama",
    "cache_config.kv_sharing_fast_prefill": False,
    "device_config.device_type": "cpu",
}


def config(**changed: Any) -> Any:
    """Something with the parts of a ``VllmConfig`` that are looked at; __ stands for a dot."""
    root = SimpleNamespace()
    for path, value in (GOOD | {k.replace("__", "."): v for k, v in changed.items()}).items():
        *owners, name = path.split(".")
        at = root
        for owner in owners:
            if not hasattr(at, owner):
                setattr(at, owner, SimpleNamespace())
            at = getattr(at, owner)
        setattr(at, name, value)
    return root


def test_a_plain_cpu_engine_is_fine() -> None:
    check_config(config(), Settings())
    check_config(config(parallel_config__tensor_parallel_size=2), Settings())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"parallel_config__enable_hc_sp": True}, "sequence parallelism"),
        ({"parallel_config__use_sequence_parallel_moe": True}, "sequence parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__use_ubatching": True}, "micro-batches"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill"),
        ({"compilation_config__cudagraph_mode": MIXED}, "full CUDA graph"),
    ],
)
def test_what_cannot_work_is_refused_whatever_one_allows(
    changed: dict[str, Any], named: str
) -> None:
    everything = Settings(allow_unproved=frozenset(get_args(Unproved)))
    with pytest.raises(UnsupportedFeature, match=named):
        check_config(config(**changed), everything)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"scheduler_config__async_scheduling": True}, "async_scheduling"),
        ({"use_v2_model_runner": True}, "v2_runner"),
        ({"device_config__device_type": "cuda"}, "cuda"),
        ({"model_config__hf_text_config__model_type": "mamba"}, "architecture"),
        ({"kv_transfer_config": object()}, "kv_connector"),
    ],
)
def test_what_no_test_has_been_through_needs_a_word(changed: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedFeature, match=name):
        check_config(config(**changed), Settings())
    check_config(config(**changed), Settings(allow_unproved={name}))


def test_ranks_have_linear_maps_by_part() -> None:
    settings = Settings(sites=("block_output", "linear:mlp.up_proj"))
    check_config(config(), settings)
    with pytest.raises(UnsupportedFeature, match="tensor parallelism"):
        check_config(config(parallel_config__tensor_parallel_size=2), settings)


@pytest.mark.parametrize(
    ("given", "field"),
    [({"site": []}, "site"), ({"sites": ["nowhere"]}, "sites"), ({"resident_bytes": -1}, "bytes")],
)
def test_settings_are_checked(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Settings.of(SimpleNamespace(additional_config={"reft": given}))
