"""States that the first edited layer reads, computed once and kept.

Below that layer every token of a row is the frozen base's own, so its states there are the same
in every epoch, as its beginning's keys and values are (:mod:`trainer.prefix`).

Dimension letters: N cells, n tokens of one row, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_core.sites import find_layers
from trainer.budget import Budget
from trainer.packing import PackedRow, Packing, Tokens
from trainer.row_attention import RowAttention, attending_by_row


class StateStore:
    """What layer ``first`` is given of each row's cells, in the base's dtype, while it fits.

    Rows that no longer fit are computed again each time, without a graph.
    """

    def __init__(self, base: PreTrainedModel, first: int, budget: Budget) -> None:
        self._base = base
        self._below, self._above = find_layers(base)[:first], find_layers(base)[first:]
        self._budget = budget
        self._kept: dict[tuple[Tokens, Tokens], Tensor] = {}
        self._others: tuple[Any, ...] | None = None
        """What a layer puts out behind its states; None for one that puts out nothing else."""

    def read(self, packing: Packing, attention: RowAttention) -> Tensor:
        """States (1, N, d) of the cells; ``attention`` is that of the same packing."""
        rows = packing.rows
        found = {key: self._kept[key] for row in rows if (key := _key(row)) in self._kept}
        new = [place for place, row in enumerate(rows) if _key(row) not in found]
        if new:
            for place, states in zip(new, self._compute(new, packing, attention), strict=True):
                found[_key(rows[place])] = states
                self._keep(_key(rows[place]), states)
        return _by_cell(packing, found)

    @contextmanager
    def giving(self, states: Tensor) -> Iterator[None]:
        """While open, the layers below do nothing, and the first edited one is given ``states``."""
        output = states if self._others is None else (states, *self._others)
        with _putting_out(self._below, [output]):
            yield

    def _keep(self, key: tuple[Tokens, Tokens], states: Tensor) -> None:
        if key not in self._kept and self._budget.take(states.nbytes):
            self._kept[key] = states

    @torch.no_grad()
    def _compute(
        self, places: Sequence[int], packing: Packing, attention: RowAttention
    ) -> list[Tensor]:
        """States (n, d) of the rows in ``places``, edits or not."""
        rows = [packing.rows[place] for place in places]
        unedited = [PackedRow(row.beginning, row.tokens, ((),) * len(row.tokens)) for row in rows]
        own = Packing.of(unedited, 0, packing.tokens.device)
        outputs: list[Any] = []
        handle = self._below[-1].register_forward_hook(
            lambda _module, _args, output: outputs.append(output)
        )
        try:
            with attending_by_row(self._base), _putting_out(self._above, outputs):
                self._base.base_model(**attention.of_rows(places, own).inputs())
        finally:
            handle.remove()
        (output,) = outputs
        self._others = output[1:] if isinstance(output, tuple) else None
        states: Tensor = output if self._others is None else output[0]  # (1, N, d)
        return [
            states[0, cells[: len(row.tokens)]]
            for row, cells in zip(own.rows, own.cells, strict=True)
        ]


@torch.no_grad()
def begins_at(base: PreTrainedModel, first: int) -> bool:
    """Whether ``base`` computes the same if no layer below ``first`` runs again.

    It does not where a later layer looks at more of an earlier one than its states.
    """
    attention, other = (
        RowAttention(Packing.of([PackedRow((), text, ((),) * 3)], 0, base.device))
        for text in ((1, 2, 3), (4, 5, 6))
    )
    store = StateStore(base, first, Budget(0))
    states = store.read(attention.packing, attention)
    with attending_by_row(base):
        whole = base(**attention.inputs()).logits
        base(**other.inputs())  # lest a layer finds what another left of the same text
        with store.giving(states):
            upper = base(**attention.inputs()).logits
    return torch.allclose(whole, upper, rtol=1e-3, equal_nan=True)


def _key(row: PackedRow) -> tuple[Tokens, Tokens]:
    return row.beginning, row.tokens


def _by_cell(packing: Packing, states: Mapping[tuple[Tokens, Tokens], Tensor]) -> Tensor:
    """States (1, N, d) of all cells from those (n, d) of each row."""
    rows = [states[_key(row)] for row in packing.rows]
    found = rows[0].new_empty(len(packing.tokens), rows[0].shape[1])
    for own, cells in zip(rows, packing.cells, strict=True):
        found[cells[: len(own)]] = own
    return found[None]


@contextmanager
def _putting_out(layers: Sequence[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """While open, each of ``layers`` puts out the last of ``outputs``, whatever it is given."""
    for layer in layers:
        layer.forward = lambda *_args, **_kwargs: outputs[-1]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
