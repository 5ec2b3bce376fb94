from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from reft_core.loading import cache_argument
from tests.factories import tiny_model
from trainer.prefix import PrefixStore

ROWS = [[5, 6, 7, 8], [9, 10], []]
WIDTH = 4


def arguments(rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and positions of rows padded on the left to :data:`WIDTH`."""
    ids = torch.tensor([[0] * (WIDTH - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (WIDTH - len(row)) + [1] * len(row) for row in rows])
    positions = torch.tensor([[0] * (WIDTH - len(row)) + list(range(len(row))) for row in rows])
    return ids, mask, positions


class CountingStore(PrefixStore):
    """Says how many rows it computed."""

    num_computed = 0

    def _compute(self, input_ids: Tensor, *rest: Tensor) -> Tensor:
        self.num_computed += len(input_ids)
        return super()._compute(input_ids, *rest)


def states(cache: DynamicCache) -> Tensor:
    return torch.stack([t for layer in cache.layers for t in (layer.keys, layer.values)])


def test_states_are_the_models_own_whatever_shares_the_batch() -> None:
    model = tiny_model()
    found = states(PrefixStore(model, 2**20).cache(*arguments(ROWS)))
    for row, tokens in enumerate(ROWS[:2]):
        alone = DynamicCache()
        model.model(
            input_ids=torch.tensor([tokens]), use_cache=True, **cache_argument(model.model, alone)
        )
        torch.testing.assert_close(
            found[:, row, :, WIDTH - len(tokens) :], states(alone)[:, 0], atol=1e-5, rtol=1e-5
        )
    assert found[:, 2].count_nonzero() == 0


def test_each_beginning_is_computed_once() -> None:
    store = CountingStore(tiny_model(), 2**20)
    first = store.cache(*arguments([*ROWS, ROWS[0]]))
    assert store.num_computed == 2
    # A caller extends what it was given; the store must not see that.
    first.update(torch.ones(4, 2, 1, 8), torch.ones(4, 2, 1, 8), 0)
    again = store.cache(*arguments([ROWS[1], ROWS[0]]))
    assert store.num_computed == 2
    assert torch.equal(states(again)[:, 1], states(store.cache(*arguments(ROWS[:1])))[:, 0])
    assert again.get_seq_length() == WIDTH


def test_what_does_not_fit_is_computed_again() -> None:
    roomy = CountingStore(tiny_model(), 2**20)
    roomy.cache(*arguments(ROWS[:1]))
    tight = CountingStore(tiny_model(), roomy.num_bytes)
    tight.cache(*arguments(ROWS))
    tight.cache(*arguments(ROWS))
    assert tight.num_computed == 3, "the first beginning fits, the second does not"
    assert tight.num_bytes == roomy.num_bytes
