"""Joined linear maps compute what the maps do, in the maps' own memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reft_core.engine import cuda_graphs
from reft_core.engine import engine as engine_module
from reft_core.engine import operations as operations_module
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.fused import FAMILIES, FusedForward
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.linear import JoinedLinear
from tests.factories import assert_close, random_adapter, random_prompt, tiny_loaded, tiny_model
from tests.reference.slow import reference_generate
from tests.reft_core.engine.test_cuda_graphs import Recorder

PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(5,), (5, 2, 2)])
def test_equals_the_maps_one_after_the_other(sizes: tuple[int, ...], bias: bool) -> None:
    maps = [nn.Linear(7, size, bias=bias).requires_grad_(False) for size in sizes]
    x, other = torch.randn(3, 7), torch.randn(3, sum(sizes))
    expected = torch.cat([linear(x) for linear in maps], dim=1)
    joined = JoinedLinear(*maps)
    assert_close(joined(x), expected)
    before = other.clone()
    assert_close(joined.plus(x, other), expected + other)
    assert_close(other, before, tolerance=0)
    assert_close(torch.cat([linear(x) for linear in maps], dim=1), expected)


def test_the_maps_read_the_joined_memory() -> None:
    maps = [nn.Linear(7, size, bias=False).requires_grad_(False) for size in (5, 2)]
    kept = [linear.weight for linear in maps]
    joined = JoinedLinear(*maps)
    assert all(linear.weight is weight for linear, weight in zip(maps, kept, strict=True))
    storages = {linear.weight.untyped_storage().data_ptr() for linear in maps}
    assert storages == {joined._weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_forward_over_them_equals_the_reference(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with recorded steps; LoRA's adapter goes through transformers' code."""
    record = Recorder()
    monkeypatch.setattr(operations_module, "PackedLinear", JoinedLinear)
    monkeypatch.setattr(cuda_graphs, "MIN_KEYS", 8)
    monkeypatch.setattr(engine_module, "recorder_for", lambda *_args: record)
    loaded = tiny_loaded(family)
    config = EngineConfig(max_num_seqs=3, max_model_len=48, max_prefill_tokens=7, forward="torch")
    engine = EmbeddedEngine(loaded, config)
    assert engine._runner._fused is not None
    adapters: list[Any] = [
        None,
        random_adapter(loaded.description, seed=1, positions="f2+l2"),
        random_adapter(
            loaded.description, seed=2, method="lora", sites=("linear:self_attn.v_proj",)
        ),
    ]
    for adapter in adapters[1:]:
        engine.load_adapter(adapter)
    prompts = [random_prompt(3 + 4 * i, i) for i in range(6)]
    requests = [
        Request(str(i), prompt, PARAMS, (AdapterChoice(adapter.digest),) if adapter else ())
        for i, prompt in enumerate(prompts)
        for adapter in [adapters[i % 3]]
    ]
    engine.start()
    try:
        completions = generate(engine, requests)
    finally:
        engine.stop()
    reference = tiny_model(family)
    for i, completion in enumerate(completions):
        expected = reference_generate(reference, prompts[i], 8, adapters[i % 3])
        assert completion.token_ids == expected
    assert record.num_replays > len(engine._runner.graphs or ())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_fused_forward_serves_without_a_second_copy(
    family: str, dtype: torch.dtype
) -> None:
    loaded = tiny_loaded(family)
    loaded.model.to("cuda", dtype)
    assert FusedForward.is_for(loaded.model)
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=48))
    fused = engine._runner._fused
    assert fused is not None
    assert fused.num_bytes == 0
