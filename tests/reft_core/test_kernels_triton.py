"""Triton's kernel equals the loop over rows, for any mix of ranks, rows and strengths.

Without a GPU these tests run in Triton's interpreter, if Triton is installed and
``TRITON_INTERPRET=1`` is set before anything imports it; one test starts such a run by itself.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reft_core import kernels
from reft_core.batch import RowEdit
from reft_core.edits import Edit
from reft_core.kernels import apply_edits, grouped_kernel
from tests.factories import assert_close
from tests.reference.slow import reference_delta

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
ROOT = Path(__file__).parents[2]
N, D = 48, 72
"""A width that no tile divides."""

needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton with a CUDA device or with TRITON_INTERPRET=1",
)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def low_rank(rank: int, *, bias: bool = True) -> Edit:
    drawn = torch.randn(rank) if bias else None
    return Edit(down=torch.randn(D, rank) / D**0.5, up=torch.randn(rank, D), bias=drawn)


def on(device: str, edit: Edit, rows: list[int], strength: float, depth: int | None) -> RowEdit:
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    return RowEdit(edit.to(device=device), index, strength, depth)


def loop(hidden: Tensor, edits: list[RowEdit]) -> Tensor:
    """h + strength · Δ(h) row by row, in float32 and rounded once."""
    result = hidden.cpu().clone()
    for row_edit in edits:
        edit = row_edit.edit.to(device="cpu")
        for place, row in enumerate(row_edit.rows.tolist()):
            one = edit
            if edit.bias is not None and edit.bias.dim() == 2:
                one = Edit(down=edit.down, up=edit.up, bias=edit.bias[place])
            h = result[row].float()
            result[row] = (h + row_edit.strength * reference_delta(one, h)).to(hidden.dtype)
    return result


def check(hidden: Tensor, edits: list[RowEdit]) -> None:
    from reft_core.kernels_triton import apply_grouped

    expected = loop(hidden, edits)
    edited = {row for row_edit in edits for row in row_edit.rows.tolist()}
    others = [row for row in range(len(hidden)) if row not in edited]
    before = hidden[others].clone()
    assert apply_grouped(hidden, edits)
    tolerance = 1e-5 if hidden.dtype == torch.float32 else 1e-2
    assert_close(hidden.cpu().float(), expected.float(), tolerance)
    assert torch.equal(hidden[others], before)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edits_of_several_ranks_and_row_counts(dtype: torch.dtype, device: str) -> None:
    order = torch.randperm(N).tolist()
    edits = [
        on(device, low_rank(1), order[:14], 1.0, 0),
        on(device, low_rank(8, bias=False), order[14:15], 0.3, 0),
        on(device, low_rank(17), order[15:35], -2.0, 0),
        on(device, low_rank(4), [], 1.0, 0),
    ]
    check(torch.randn(N, D, device=device).to(dtype), edits)


@needs_kernel
@pytest.mark.parametrize("depths", [(0, 1), (None, None)])
def test_edits_of_one_row_act_in_order(depths: tuple[int | None, ...], device: str) -> None:
    rows = [[3, 5, 9], [9, 3]]
    edits = [
        on(device, low_rank(3), own, 1.0, depth) for own, depth in zip(rows, depths, strict=True)
    ]
    hidden = torch.randn(N, D, device=device)
    there, back = loop(hidden, edits), loop(hidden, edits[::-1])
    assert (there - back).abs().max() > 1e-2, "the order matters here"
    check(hidden, edits)


@needs_kernel
def test_a_bias_for_each_row(device: str) -> None:
    """As interchanges have one."""
    edit = Edit(down=torch.randn(D, 3) / D**0.5, up=torch.randn(3, D), bias=torch.randn(20, 3))
    check(torch.randn(N, D, device=device), [on(device, edit, list(range(20)), 0.5, 0)])


@needs_kernel
def test_no_edits_change_no_bit(device: str) -> None:
    hidden = torch.randn(N, D, device=device)
    check(hidden, [])
    check(hidden, [on(device, low_rank(3), [], 1.0, 0)])


@needs_kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy says it overflows
def test_a_row_that_overflows_stays_alone(device: str) -> None:
    poison = Edit(down=torch.full((D, 2), 3e38), up=torch.full((2, D), 3e38))
    fine = on(device, low_rank(2), [1, 2], 1.0, 0)
    hidden = torch.randn(N, D, device=device)
    expected = loop(hidden, [fine])
    from reft_core.kernels_triton import apply_grouped

    assert apply_grouped(hidden, [on(device, poison, [0], 1.0, 0), fine])
    assert not hidden[0].isfinite().all()
    assert_close(hidden[1:].cpu(), expected[1:])


@needs_kernel
@pytest.mark.parametrize(
    "edit",
    [
        Edit(shift=torch.randn(D)),
        Edit(down=torch.randn(D, 2), up=torch.randn(2, D), gain=torch.randn(D)),
        Edit(down=torch.randn(D, 2), up=torch.randn(2, D), skip=torch.randn(D, 2)),
        Edit(down=torch.randn(D, 2), up=torch.randn(2, D), activation="relu"),
        Edit(down=torch.randn(D, 2), up=torch.randn(2, D), source="input"),
        Edit(down=torch.randn(D, 2), up=torch.randn(2, D), scale=2.0),
        Edit(down=torch.randn(D, 129), up=torch.randn(129, D)),
    ],
)
def test_other_edits_are_left_to_torch(edit: Edit, device: str) -> None:
    from reft_core.kernels_triton import apply_grouped

    hidden = torch.randn(N, D, device=device)
    before = hidden.clone()
    mixed = [on(device, low_rank(2), [1], 1.0, 0), on(device, edit, [2], 1.0, 0)]
    assert not apply_grouped(hidden, mixed)
    assert torch.equal(hidden, before)


@needs_kernel
def test_its_own_trial_passes(device: str) -> None:
    from reft_core.kernels_triton import check as trial

    trial(torch.device(device))


@pytest.mark.gpu
def test_on_a_gpu_edits_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    assert grouped_kernel(torch.device("cuda", 0)) is not None
    monkeypatch.setattr(kernels, "_alike", lambda _edits: pytest.fail("passed by"))
    edits = [on("cuda", low_rank(4), [2 * i, 2 * i + 1], 1.0, 0) for i in range(5)]
    hidden = torch.randn(N, D, device="cuda")
    expected = loop(hidden, edits)
    apply_edits(hidden, hidden, edits)
    assert_close(hidden.cpu(), expected)


def test_a_cpu_has_none() -> None:
    assert grouped_kernel(torch.device("cpu")) is None


def test_one_that_cannot_be_tried_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here because the import fails, as where Triton is not installed."""
    monkeypatch.setitem(sys.modules, "reft_core.kernels_triton", None)
    monkeypatch.delattr("reft_core.kernels_triton", raising=False)
    assert grouped_kernel.__wrapped__(torch.device("cuda", 0)) is None
    assert "edits are applied without Triton" in caplog.text


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, and to be outside of it")
def test_in_the_interpreter() -> None:
    """All of this file once more, on a CPU."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
