"""apply_edits equals a loop over rows, rounds once, and touches no other row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reft_core.adapter import EditKey
from reft_core.batch import RowEdit
from reft_core.edits import Activation, Edit
from reft_core.kernels import apply_edits
from tests.factories import assert_close, random_edits
from tests.reference.slow import reference_delta

N, D = 12, 16


def random_edit(method: str, rank: int = 3, activation: Activation = "identity") -> Edit:
    return random_edits(method, D, [0], 1, rank, activation)[EditKey(0, "block_output", 0)]


def row_edit(edit: Edit, rows: list[int], strength: float = 1.0) -> RowEdit:
    return RowEdit(edit, torch.tensor(rows, dtype=torch.int64), strength)


def loop(hidden: Tensor, edits: list[RowEdit]) -> Tensor:
    """h + strength · Δ(h), row by row, in float32 and rounded once."""
    result = hidden.clone()
    for edit in edits:
        for row in edit.rows.tolist():
            h = result[row].float()
            result[row] = (h + edit.strength * reference_delta(edit.edit, h)).to(hidden.dtype)
    return result


@pytest.mark.parametrize("method", ["loreft", "direft", "direft_orthonormal"])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
def test_equals_the_loop(method: str, activation: Activation, strength: float) -> None:
    """Adapters of different ranks on different rows, in no order."""
    edits = [
        row_edit(random_edit(method, 3, activation), [7, 0, 2], strength),
        row_edit(random_edit("direft", 1), [11], strength),
        row_edit(Edit(shift=torch.randn(D), gain=torch.randn(D)), [5, 4], strength),
        row_edit(random_edit("loreft", D), [], strength),
    ]
    hidden = torch.randn(N, D)
    expected = loop(hidden, edits)
    untouched = [1, 3, 6, 8, 9, 10]
    before = hidden[untouched].clone()
    apply_edits(hidden, edits)
    assert_close(hidden, expected)
    assert_close(hidden[untouched], before, tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_half_precision_rounds_once(dtype: torch.dtype, strength: float) -> None:
    """The result is the float32 result's rounding, up to a tie that float32 error tips."""
    edit = row_edit(random_edit("loreft"), list(range(N)), strength)
    hidden = (8 * torch.randn(N, D)).to(dtype)
    h = hidden.float()
    delta = strength * torch.stack([reference_delta(edit.edit, state) for state in h])
    once = (h + delta).to(dtype)
    delta_rounded_too = hidden + delta.to(dtype)
    apply_edits(hidden, [edit])
    assert_close(hidden, once, tolerance=torch.finfo(dtype).eps)
    assert (hidden != once).float().mean() < 0.01
    assert (delta_rounded_too != once).float().mean() > 0.01, "this test sees a second rounding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_changes_no_bit(dtype: torch.dtype) -> None:
    hidden = torch.randn(N, D).to(dtype)
    before = hidden.clone()
    apply_edits(hidden, [row_edit(random_edit("loreft"), list(range(N)), 0.0)])
    assert torch.equal(hidden, before)


def test_no_edits_change_no_bit() -> None:
    hidden = torch.randn(N, D)
    before = hidden.clone()
    apply_edits(hidden, [])
    assert torch.equal(hidden, before)


def test_a_row_that_overflows_stays_alone() -> None:
    """A poisonous adapter makes its own rows infinite and no other."""
    hidden = torch.randn(N, D)
    edits = [
        row_edit(Edit(shift=torch.full((D,), 3e38), gain=torch.full((D,), 3e38)), [2]),
        row_edit(random_edit("loreft"), [3]),
    ]
    expected = loop(hidden, edits[1:])
    apply_edits(hidden, edits)
    assert not hidden[2].isfinite().all()
    others = [row for row in range(N) if row != 2]
    assert_close(hidden[others], expected[others])


def test_works_on_a_view_in_inference_mode() -> None:
    """As the runner calls it: (1, N, d) viewed as rows."""
    edit = row_edit(random_edit("loreft"), [0, 5])
    with torch.inference_mode():
        hidden = torch.randn(1, N, D)
        expected = loop(hidden[0], [edit])
        apply_edits(hidden.view(-1, D), [edit])
        assert_close(hidden[0], expected)
