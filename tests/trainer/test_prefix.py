from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from reft_core.loading import cache_argument
from tests.factories import tiny_model
from trainer.packing import Tokens
from trainer.prefix import PrefixStore

ROWS: list[Tokens] = [(5, 6, 7, 8), (5, 6), ()]


class CountingStore(PrefixStore):
    """Says how many beginnings it computed."""

    num_computed = 0

    def _compute(self, beginnings: list[Tokens]) -> list[Tensor]:
        self.num_computed += len(beginnings)
        return super()._compute(beginnings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_states_are_the_models_own_whatever_shares_the_batch(family: str) -> None:
    model = tiny_model(family)
    found = PrefixStore(model, 2**20).read(ROWS)  # (L, 2, B, H, S, D)
    for row, tokens in enumerate(ROWS[:2]):
        cache = DynamicCache()
        ids = torch.tensor([tokens])
        model.base_model(input_ids=ids, use_cache=True, **cache_argument(model.base_model, cache))
        alone = torch.stack([torch.stack((at.keys[0], at.values[0])) for at in cache.layers])
        torch.testing.assert_close(found[:, :, row, :, : len(tokens)], alone, atol=1e-5, rtol=1e-5)
        assert found[:, :, row, :, len(tokens) :].count_nonzero() == 0
    assert found[:, :, 2].count_nonzero() == 0


def test_each_beginning_is_computed_once() -> None:
    store = CountingStore(tiny_model(), 2**20)
    first = store.read([*ROWS, ROWS[0]])
    assert store.num_computed == 2
    expected = first.clone()
    first.zero_()  # a caller owns what it was given
    again = store.read([ROWS[1], ROWS[0]])
    assert store.num_computed == 2
    assert torch.equal(again[:, :, 1], expected[:, :, 0])
    assert torch.equal(again[:, :, 0], expected[:, :, 1])


def test_what_does_not_fit_is_computed_again() -> None:
    roomy = CountingStore(tiny_model(), 2**20)
    roomy.read(ROWS[:1])
    tight = CountingStore(tiny_model(), roomy.budget.num_bytes)
    found = [tight.read(ROWS) for _ in range(2)]
    assert tight.num_computed == 3, "the first beginning fits, the second does not"
    assert tight.budget.num_bytes == roomy.budget.num_bytes
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_states_are_kept_in_the_bases_dtype() -> None:
    store = PrefixStore(tiny_model().to(torch.bfloat16), 2**20)
    states = store.read(ROWS[:1])
    assert states.dtype == torch.bfloat16
    assert store.budget.num_bytes == states.numel() * 2
