"""The canonical edit equals its formula, folded or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reft_core.edits import ACTIVATION_NAMES, PARTS, Activation, Edit, Part
from tests.factories import assert_close
from tests.reference.slow import reference_delta

D = 8

LOW_RANK: list[tuple[Part, ...]] = [
    ("down", "up"),
    ("down", "up", "bias"),
    ("down", "skip", "up"),
    ("down", "skip", "up", "bias"),
]
VECTORS: list[tuple[Part, ...]] = [(), ("shift",), ("gain",), ("shift", "gain")]


def random_edit(
    parts: tuple[Part, ...],
    rank: int = 2,
    activation: Activation = "identity",
    scale: float = 1.0,
    seed: int = 0,
) -> Edit:
    """An edit with these parts drawn from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "down": (D, rank),
        "skip": (D, rank),
        "up": (rank, D),
        "bias": (rank,),
        "shift": (D,),
        "gain": (D,),
    }
    tensors = {part: torch.randn(shapes[part], generator=generator) for part in parts}
    return Edit(**tensors, activation=activation, scale=scale)


def reference_deltas(edit: Edit, h: Tensor) -> Tensor:
    return torch.stack([reference_delta(edit, state) for state in h])


@given(
    low_rank=st.sampled_from([(), *LOW_RANK]),
    vectors=st.sampled_from(VECTORS),
    rank=st.integers(1, D),
    activation=st.sampled_from(ACTIVATION_NAMES),
    scale=st.sampled_from([1.0, 0.0, -2.5, 4.0]),
    num_tokens=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_delta_is_the_formula(
    low_rank: tuple[Part, ...],
    vectors: tuple[Part, ...],
    rank: int,
    activation: Activation,
    scale: float,
    num_tokens: int,
    seed: int,
) -> None:
    """Also folded, which must not change the given edit."""
    edit = random_edit(low_rank + vectors, rank, activation, scale, seed)
    h = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed + 1))
    expected = reference_deltas(edit, h) if num_tokens else torch.zeros(0, D)
    assert_close(edit.delta(h), expected)
    assert_close(edit.fold().delta(h), expected)
    assert_close(edit.delta(h), expected)


@pytest.mark.parametrize("parts", LOW_RANK)
def test_identity_folds_to_two_thin_products(parts: tuple[Part, ...]) -> None:
    folded = random_edit(parts, scale=3.0).fold()
    assert folded.skip is None
    assert folded.scale == 1.0
    assert {part for part, _ in folded.parts()} == set(parts) - {"skip"}
    twice = folded.fold()
    for (_, once), (_, again) in zip(folded.parts(), twice.parts(), strict=True):
        assert_close(again, once, tolerance=0)


@pytest.mark.parametrize("activation", [name for name in ACTIVATION_NAMES if name != "identity"])
def test_other_activations_keep_their_form(activation: Activation) -> None:
    edit = random_edit(("down", "skip", "up", "bias"), activation=activation, scale=3.0)
    assert edit.fold() is edit


def test_the_input_of_the_site_feeds_the_low_rank_part_alone() -> None:
    """A parallel adapter reads x, and gain multiplies h."""
    series = random_edit(PARTS, activation="relu", scale=2.0)
    edit = replace(series, source="input")
    assert edit.gain is not None
    h, x = torch.randn(2, 3, D)
    from_x = reference_deltas(replace(series, gain=None), x)
    assert_close(edit.delta(h, x), from_x + edit.gain * h)
    assert_close(series.delta(h, x), reference_deltas(series, h))
    with pytest.raises(AssertionError, match="site's input"):
        edit.delta(h)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_input_and_output_may_differ_in_width(activation: Activation) -> None:
    """down and skip are as wide as x, the rest as h; folding changes nothing of that."""
    wide = 5
    edit = Edit(
        down=torch.randn(wide, 2),
        skip=torch.randn(wide, 2),
        up=torch.randn(2, D),
        bias=torch.randn(2),
        shift=torch.randn(D),
        gain=torch.randn(D),
        activation=activation,
        scale=3.0,
        source="input",
    )
    h, x = torch.randn(4, D), torch.randn(4, wide)
    pairs = zip(h, x, strict=True)
    expected = torch.stack([reference_delta(edit, state, given) for state, given in pairs])
    for same in (edit, edit.fold(), edit.to(device="cpu")):
        assert same.source == "input"
        assert_close(same.delta(h, x), expected)
    half = torch.bfloat16
    assert edit.delta(h.to(half), x.to(half)).dtype == torch.float32


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_scaling_a_rank_scales_what_it_adds(activation: Activation, folded: bool) -> None:
    """Of the low-rank part alone, and in a new edit."""
    edit = random_edit(PARTS, rank=3, activation=activation, scale=2.0)
    edit = edit.fold() if folded else edit
    h = torch.randn(4, D)
    before = edit.delta(h)
    rest = replace(edit, down=None, skip=None, up=None, bias=None)
    ranks = []
    for j in range(3):
        assert edit.down is not None
        assert edit.up is not None
        assert edit.bias is not None
        one = replace(
            edit,
            down=edit.down[:, j : j + 1],
            skip=None if edit.skip is None else edit.skip[:, j : j + 1],
            up=edit.up[j : j + 1],
            bias=edit.bias[j : j + 1],
            shift=None,
            gain=None,
        )
        ranks.append(one.delta(h))
    factors = torch.tensor([0.5, 0.0, -3.0])
    weighted = torch.stack([factor * rank for factor, rank in zip(factors, ranks, strict=True)])
    expected = weighted.sum(0) + rest.delta(h)
    assert_close(edit.scale_ranks(factors).delta(h), expected)
    assert_close(edit.delta(h), before, tolerance=0)
    with pytest.raises(AssertionError, match="ranks to scale"):
        rest.scale_ranks(torch.ones(0))


@pytest.mark.parametrize(
    ("parts", "rank", "numbers"),
    [
        ((), 0, 0),
        (("shift",), 0, D),
        (("shift", "gain"), 0, 2 * D),
        (("down", "up"), 3, 2 * 3 * D),
        (PARTS, 3, 3 * 3 * D + 3 + 2 * D),
    ],
)
def test_counts(parts: tuple[Part, ...], rank: int, numbers: int) -> None:
    edit = random_edit(parts, rank)
    assert edit.rank == rank
    assert edit.num_parameters == numbers
    assert [part for part, _ in edit.parts()] == [part for part in PARTS if part in parts]


@pytest.mark.parametrize("parts", [("shift",), ("gain",), ("down", "up", "bias"), PARTS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32_whatever_the_states_are(
    parts: tuple[Part, ...], dtype: torch.dtype
) -> None:
    edit = random_edit(parts)
    h = torch.randn(3, D).to(dtype)
    assert_close(edit.delta(h), reference_deltas(edit, h.float()))


def test_an_empty_edit_changes_nothing() -> None:
    assert_close(Edit().delta(torch.randn(3, D).bfloat16()), torch.zeros(3, D), tolerance=0)


@pytest.mark.parametrize("parts", [("shift",), ("gain",), ("down", "up")])
def test_the_result_may_be_changed_in_place(parts: tuple[Part, ...]) -> None:
    """It shares no memory with the edit, nor between its rows."""
    edit = random_edit(parts)
    h = torch.randn(3, D)
    expected = reference_deltas(edit, h)
    edit.delta(h)[0].zero_()
    assert_close(edit.delta(h), expected)
    changed = edit.delta(h)
    changed[0].zero_()
    assert_close(changed[1:], expected[1:])


def test_to_casts_every_part_and_keeps_the_rest() -> None:
    edit = random_edit(PARTS, activation="gelu", scale=2.0)
    transposed = replace(edit, up=edit.up.mT.contiguous().mT) if edit.up is not None else edit
    moved = transposed.to(dtype=torch.float16, device="cpu")
    assert (moved.activation, moved.scale) == ("gelu", 2.0)
    for (part, before), (same_part, after) in zip(edit.parts(), moved.parts(), strict=True):
        assert part == same_part
        assert after.is_contiguous()
        assert_close(after, before.half(), tolerance=0)


@pytest.mark.parametrize("parts", [("down",), ("up",), ("bias",), ("skip", "shift")])
def test_incomplete_parts_break_an_invariant(parts: tuple[Part, ...]) -> None:
    with pytest.raises(AssertionError):
        random_edit(parts)
