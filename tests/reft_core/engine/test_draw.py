"""Batched draws equal the slow reference bit for bit, whatever rows stand beside each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reft_core.engine import draw as draw_module
from reft_core.engine.draw import draw
from reft_core.engine.interface import SamplingParams
from tests.reference.sampling import reference_draw

LARGEST_UNIFORM = 1 - 2**-53

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1e-7, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 5, 17, 300]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]),
)
uniforms = st.one_of(st.floats(0, LARGEST_UNIFORM), st.just(LARGEST_UNIFORM))


def make_logits(seed: int, vocab_size: int, spread: float, coarse: bool, sparse: bool) -> Tensor:
    """One row; coarse ones have many ties, as bfloat16 makes them, sparse ones many zeros."""
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    if coarse:
        row = row.bfloat16().float()
    if sparse:
        row[::2] = -math.inf
    return row


logits = st.builds(
    make_logits,
    seed=st.integers(0, 10_000),
    vocab_size=st.just(300),
    spread=st.sampled_from([0.0, 0.5, 3.0, 10.0]),
    coarse=st.booleans(),
    sparse=st.booleans(),
)


@pytest.mark.parametrize("heads", [(256, 4096), (4, 16), (1,), ()])
@given(rows=st.lists(st.tuples(logits, params, uniforms), min_size=1, max_size=6))
def test_every_row_is_the_references(
    heads: tuple[int, ...], rows: list[tuple[Tensor, SamplingParams, float]]
) -> None:
    """However much of the vocabulary is looked at first, also where ties are cut in two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_module, "_HEADS", heads)
        found = draw(
            torch.stack([row for row, _, _ in rows]), [p for _, p, _ in rows], [u for *_, u in rows]
        )
    assert found == [reference_draw(*row) for row in rows]


@pytest.mark.parametrize("fields", [{}, {"top_k": 40}, {"top_p": 0.95}, {"min_p": 0.02}])
def test_a_large_vocabulary(fields: dict[str, Any]) -> None:
    """Flat rows that keep thousands of tokens stand among peaked ones."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 20_000, generator=generator) * torch.tensor(
        [[0.1], [1], [2], [4], [6], [9]]
    )
    numbers = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    same = [SamplingParams(**fields)] * 6
    expected = [reference_draw(row, same[0], u) for row, u in zip(rows, numbers, strict=True)]
    assert draw(rows, same, numbers) == expected
    assert len(set(expected)) == 6


def test_only_rows_that_need_it_are_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_rows: list[int] = []
    real = Tensor.sort

    def spy(self: Tensor, **options: Any) -> Any:
        sorted_rows.append(len(self))
        return real(self, **options)

    monkeypatch.setattr(Tensor, "sort", spy)
    rows = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(2))
    rows *= torch.tensor([[0.01], [6], [6], [0.01]])
    nucleus, free = SamplingParams(top_p=0.9), SamplingParams(min_p=0.001)
    draw(rows, [nucleus, nucleus, SamplingParams(top_k=50), free], [0.5] * 4)
    assert sorted_rows == [1], "the first alone keeps more than a few thousand tokens"


def test_rounding_of_logits_seldom_changes_the_choice() -> None:
    """Noise in the last bits, as another batch size makes it, reorders nothing."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(200, 5000, generator=generator) * 2
    noisy = rows * (1 + 1e-6 * torch.randn(rows.shape, generator=generator))
    numbers = torch.rand(200, generator=generator, dtype=torch.float64).tolist()
    same = [SamplingParams()] * 200
    before, after = draw(rows, same, numbers), draw(noisy, same, numbers)
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 1
