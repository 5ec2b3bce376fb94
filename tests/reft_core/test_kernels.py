"""apply_edits equals a loop over rows, rounds once, and touches no other row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reft_core.batch import RowEdit
from reft_core.edits import Activation, Edit
from reft_core.kernels import apply_edits
from reft_core.methods import METHODS, SiteSizes, get_method
from reft_core.native import edits as native_edits
from tests.factories import assert_close
from tests.reference.slow import reference_delta

N, D, X = 12, 16, 20
"""Rows, width of the site's output, width of its input."""


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for the compiled loops and for torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(native_edits, "_function", lambda dtype: None)
    elif native_edits._function(torch.float32) is None:
        pytest.skip("no C++ compiler here")


def random_edit(method: str, rank: int = 3, activation: Activation = "identity") -> Edit:
    module = get_method(method)(SiteSizes(X, D, head_dim=D // 4), rank, activation)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / D**0.5)
    return module.to_edit()


def row_edit(edit: Edit, rows: list[int], strength: float = 1.0) -> RowEdit:
    return RowEdit(edit, torch.tensor(rows, dtype=torch.int64), strength)


NO_INPUT = torch.full((N, X), torch.nan)
"""The site's input where no edit may read it."""


def loop(hidden: Tensor, edits: list[RowEdit], x: Tensor = NO_INPUT) -> Tensor:
    """h + strength · Δ(h, x), row by row, in float32 and rounded once."""
    result = hidden.clone()
    for edit in edits:
        for row in edit.rows.tolist():
            h = result[row].float()
            delta = reference_delta(edit.edit, h, x[row].float())
            result[row] = (h + edit.strength * delta).to(hidden.dtype)
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
    apply_edits(hidden, NO_INPUT, edits)
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
    apply_edits(hidden, NO_INPUT, [edit])
    assert_close(hidden, once, tolerance=torch.finfo(dtype).eps)
    assert (hidden != once).float().mean() < 0.01
    assert (delta_rounded_too != once).float().mean() > 0.01, "this test sees a second rounding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_changes_no_bit(dtype: torch.dtype) -> None:
    hidden = torch.randn(N, D).to(dtype)
    before = hidden.clone()
    apply_edits(hidden, NO_INPUT, [row_edit(random_edit("loreft"), list(range(N)), 0.0)])
    assert torch.equal(hidden, before)


def test_no_edits_change_no_bit() -> None:
    hidden = torch.randn(N, D)
    before = hidden.clone()
    apply_edits(hidden, NO_INPUT, [])
    assert torch.equal(hidden, before)


def test_a_row_that_overflows_stays_alone() -> None:
    """A poisonous adapter makes its own rows infinite and no other."""
    hidden = torch.randn(N, D)
    edits = [
        row_edit(Edit(shift=torch.full((D,), 3e38), gain=torch.full((D,), 3e38)), [2]),
        row_edit(random_edit("loreft"), [3]),
    ]
    expected = loop(hidden, edits[1:])
    apply_edits(hidden, NO_INPUT, edits)
    assert not hidden[2].isfinite().all()
    others = [row for row in range(N) if row != 2]
    assert_close(hidden[others], expected[others])


def test_works_on_a_view_in_inference_mode() -> None:
    """As the runner calls it: (1, N, d) viewed as rows."""
    edit = row_edit(random_edit("loreft"), [0, 5])
    with torch.inference_mode():
        hidden = torch.randn(1, N, D)
        expected = loop(hidden[0], [edit])
        apply_edits(hidden.view(-1, D), NO_INPUT, [edit])
        assert_close(hidden[0], expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_reads_what_it_should(method: str, dtype: torch.dtype) -> None:
    """Of the site's input, which has a width of its own, the rows of the edit; or nothing."""
    edit = row_edit(random_edit(method), [9, 2, 4], 0.7)
    hidden, x = torch.randn(N, D).to(dtype), torch.randn(N, X).to(dtype)
    x[[0, 1, 3]] = torch.nan
    given = NO_INPUT if edit.edit.source == "output" else x
    expected = loop(hidden, [edit], given)
    before = given.clone()
    apply_edits(hidden, given, [edit])
    assert_close(hidden, expected, tolerance=1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(given.isnan(), before.isnan())
    assert torch.equal(given.nan_to_num(), before.nan_to_num()), "the input is left alone"


@pytest.mark.parametrize("second", ["loreft", "red", "lora"])
def test_edits_of_one_row_act_in_order(second: str) -> None:
    """The second reads what the first wrote, if it reads the output; x stays what it was."""
    one, two = row_edit(random_edit("loreft"), [1, 5]), row_edit(random_edit(second), [5, 7], 2.0)
    hidden, x = torch.randn(N, D), torch.randn(N, X)
    there, back = loop(hidden, [one, two], x), loop(hidden, [two, one], x)
    assert (there[5] - back[5]).abs().max() > 1e-2, "these two do not commute"
    for order, expected in [((one, two), there), ((two, one), back)]:
        found = hidden.clone()
        apply_edits(found, x, order)
        assert_close(found, expected)


def at_depth(edit: RowEdit, depth: int) -> RowEdit:
    return replace(edit, depth=depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_stack_of_alike_edits_equals_the_loop(method: str, dtype: torch.dtype) -> None:
    """Alike edits between others of another rank or row count, each with its own strength."""
    rows = [[3, 0], [7, 5], [1, 11], [10, 2], [4], [8, 9]]
    ranks = [3, 3, 3, 3, 3, 2]
    edits = [
        at_depth(row_edit(random_edit(method, rank), own, 0.5 + 0.25 * i), 0)
        for i, (rank, own) in enumerate(zip(ranks, rows, strict=True))
    ]
    hidden, x = torch.randn(N, D).to(dtype), torch.randn(N, X).to(dtype)
    expected = loop(hidden, edits, x)
    apply_edits(hidden, x, edits)
    assert_close(hidden.float(), expected.float(), 1e-5 if dtype == torch.float32 else 1e-2)


def test_depths_are_applied_in_order() -> None:
    """Three stacks of two, alike throughout, on the same rows: depth 0 before depth 1."""
    rows = [[0, 1], [2, 3], [4, 5]]
    first = [at_depth(row_edit(random_edit("loreft"), own), 0) for own in rows]
    second = [at_depth(row_edit(random_edit("loreft"), own), 1) for own in rows]
    hidden = torch.randn(N, D)
    expected = loop(hidden, [*first, *second])
    swapped = loop(hidden, [*second, *first])
    assert (expected - swapped).abs().max() > 1e-2, "the order matters here"
    apply_edits(hidden, NO_INPUT, [*first, *second])
    assert_close(hidden, expected)


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 13, 16])
@pytest.mark.parametrize("num_rows", [1, 4, 7])
def test_every_rank_and_number_of_rows(rank: int, num_rows: int) -> None:
    """The compiled loops take ranks and rows in groups; all ends of groups are met."""
    edits = [row_edit(random_edit("loreft", rank), list(range(num_rows)))]
    hidden = torch.randn(N, D)
    expected = loop(hidden, edits)
    apply_edits(hidden, NO_INPUT, edits)
    assert_close(hidden, expected)


def test_what_the_compiled_loops_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's adapters take that way: folded and contiguous, whatever the ReFT method."""
    if native_edits._function(torch.float32) is None:
        pytest.skip("torch's operations know all edits")
    hidden = torch.randn(N, D)
    for method in ("loreft", "direft", "direft_orthonormal", "noreft", "red", "steering"):
        edit = random_edit(method).fold().to(dtype=torch.float32)
        assert native_edits.apply_natively(hidden, [row_edit(edit, [0])]), method
    before = hidden.clone()
    others = [random_edit("loreft", activation="relu"), random_edit("parallel_adapter")]
    for edit in others:
        assert not native_edits.apply_natively(hidden, [row_edit(edit, [0])])
    assert_close(hidden, before, tolerance=0)
