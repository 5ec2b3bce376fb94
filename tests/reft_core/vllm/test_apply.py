"""The operator on layers that put out two tensors, against a loop over rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse, EditPlan, PackedChunk, PromptEdits, build_plan
from reft_core.vllm.apply import Step, apply_here, arm_site, begin_step, end_step
from reft_core.vllm.layers import SiteModule
from tests.factories import (
    HIDDEN_SIZE,
    assert_close,
    random_adapter,
    shift_adapter,
    tiny_description,
)
from tests.reference.slow import reference_delta


@contextmanager
def steps_plan(plan: EditPlan) -> Iterator[Step]:
    """Have the layers apply ``plan`` while the context is open."""
    try:
        yield begin_step(plan)
    finally:
        end_step()


class Layer(nn.Module):
    """Puts out what it is given, as vLLM's layers do: two tensors to be added."""

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden * 1, residual * 1


def chunks(device: str = "cpu") -> tuple[EditPlan, Callable[[Tensor], Tensor]]:
    """A plan of three requests, two with one adapter, and what it does to layer 1's output."""
    model = tiny_description()
    one = random_adapter(model, seed=1, size=2.0, positions="f1+l2").to(device)
    two = random_adapter(model, seed=2, size=2.0, positions="prompt", method="red").to(device)
    placed = [(0, 0, 5, one), (5, 2, 4, two), (9, 3, 3, one)]

    def edits(adapter: Adapter) -> PromptEdits:
        return PromptEdits((AdapterUse(adapter, 0.5),), 6, "all")

    plan = build_plan([PackedChunk(r, f, n, edits(a)) for r, f, n, a in placed], device)

    def slowly(h: Tensor) -> Tensor:
        h = h.clone()
        for row, first, length, adapter in placed:
            for key, edit in adapter.edits.items():
                if key.layer == 1:
                    for position in adapter.rule.resolve(6)[key.unit]:
                        if first <= position < first + length:
                            at = row + position - first
                            h[at] += 0.5 * reference_delta(edit, h[at])
        return h

    return plan, slowly


def test_the_sum_is_edited() -> None:
    plan, slowly = chunks()
    layer = Layer()
    arm_site(SiteModule(layer), 1, "block_output")
    hidden, residual = torch.randn(12, HIDDEN_SIZE), torch.randn(12, HIDDEN_SIZE)
    with steps_plan(plan) as step:
        found, beside = layer(hidden, residual)
    assert torch.equal(beside, residual)
    assert_close(found + beside, slowly(hidden + residual))
    assert not torch.equal(found, hidden)
    assert step.overflowed_rows() == set()


def test_outside_of_a_step_nothing_happens() -> None:
    layer = Layer()
    arm_site(SiteModule(layer), 1, "block_output")
    hidden, residual = torch.randn(12, HIDDEN_SIZE), torch.randn(12, HIDDEN_SIZE)
    with steps_plan(chunks()[0]):
        pass
    assert torch.equal(layer(hidden, residual)[0], hidden)


def test_columns_of_a_fused_map_are_edited_alone() -> None:
    plan, slowly = chunks()
    fused = torch.randn(12, 3 * HIDDEN_SIZE)
    module = nn.Identity()
    arm_site(SiteModule(module, (HIDDEN_SIZE, 2 * HIDDEN_SIZE)), 1, "linear:a")
    plan = EditPlan({(1, "linear:a"): plan.places[1, "block_output"]})
    before = fused.clone()
    with steps_plan(plan):
        module(fused)
    middle = slice(HIDDEN_SIZE, 2 * HIDDEN_SIZE)
    assert_close(fused[:, middle], slowly(before[:, middle]))
    assert torch.equal(fused[:, :HIDDEN_SIZE], before[:, :HIDDEN_SIZE])
    assert torch.equal(fused[:, 2 * HIDDEN_SIZE :], before[:, 2 * HIDDEN_SIZE :])


def test_rows_that_overflow_stay_and_are_told() -> None:
    adapter = shift_adapter(tiny_description(), shift=3e38, gain=3e38, positions="l1")
    edits = PromptEdits((AdapterUse(adapter),), 4)
    hidden = torch.randn(8, HIDDEN_SIZE).abs()
    before = hidden.clone()
    with steps_plan(build_plan([PackedChunk(2, 0, 4, edits)])) as step:
        apply_here(hidden, None, None, 0, "block_output")
    assert step.overflowed_rows() == {5}
    assert torch.equal(hidden, before)


def test_the_compiler_keeps_the_change() -> None:
    plan, slowly = chunks()
    layer = Layer()
    arm_site(SiteModule(layer), 1, "block_output")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    hidden, residual = torch.randn(12, HIDDEN_SIZE), torch.randn(12, HIDDEN_SIZE)
    with steps_plan(plan):
        found, beside = compiled(hidden, residual)
    assert_close(found + beside, slowly(hidden + residual))
    assert torch.equal(compiled(hidden, residual)[0], hidden)


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    plan, _ = chunks("cuda")
    _, slowly = chunks()
    hidden = torch.randn(12, HIDDEN_SIZE)
    residual = torch.randn(12, HIDDEN_SIZE)
    layer = Layer()
    arm_site(SiteModule(layer), 1, "block_output")
    with steps_plan(plan):
        found, beside = layer(hidden.cuda(), residual.cuda())
    assert_close((found + beside).cpu(), slowly(hidden + residual), 1e-4)
