"""The plan: which rows of a packed prefill get which edits.

A prefill forward packs chunks of many prompts into one (N, d) tensor. Each request's edited
positions were fixed at admission from its whole prompt; here they become row numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from reft_core.adapter import Adapter, EditKey
from reft_core.edits import Edit


@dataclass(frozen=True)
class PromptEdits:
    """An adapter resolved against one prompt, at admission. Travels with the sequence.

    Chunking, preemption and recompute cannot move the positions: they are absolute, and
    computed once from the original prompt length.
    """

    adapter: Adapter
    """With its tensors on the engine's device."""
    prompt_len: int
    strength: float

    @cached_property
    def positions(self) -> tuple[tuple[int, ...], ...]:
        """Ascending edited positions of each unit."""
        return self.adapter.rule.resolve(self.prompt_len)

    def live_positions(self, key: EditKey) -> tuple[int, ...]:
        """Positions where the edit at ``key`` can change anything.

        Nothing reads the last layer's output but the logits, and only the last prompt
        token's logits are read, so a last-layer edit lives at that position alone.
        """
        positions = self.positions[key.unit]
        if key.layer < self.adapter.spec.base.num_layers - 1:
            return positions
        last = self.prompt_len - 1
        return (last,) if last in positions else ()

    @property
    def num_edits(self) -> int:
        """(layer, position) pairs that are changed, dead ones left out."""
        if self.strength == 0:
            return 0
        return sum(len(self.live_positions(key)) for key in self.adapter.edits)


@dataclass(frozen=True)
class PackedChunk:
    """One prompt's chunk in a packed forward: positions first..first+length-1."""

    row: int
    """Row of the chunk's first token."""
    first_position: int
    length: int
    edits: PromptEdits | None

    def rows_of(self, positions: Iterable[int]) -> list[int]:
        """Rows of those positions that lie in this chunk."""
        offsets = (position - self.first_position for position in positions)
        return [self.row + offset for offset in offsets if 0 <= offset < self.length]


@dataclass(frozen=True)
class RowEdit:
    """One edit and the rows of the packed forward it changes."""

    edit: Edit
    rows: Tensor
    """(K,) int64, unique, on the engine's device."""
    strength: float


@dataclass(frozen=True)
class EditPlan:
    """Per layer, the edits to apply to that layer's packed output."""

    layers: Mapping[int, list[RowEdit]] = field(default_factory=dict)

    @property
    def num_edits(self) -> int:
        """(layer, row) pairs the plan changes."""
        return sum(len(edit.rows) for edits in self.layers.values() for edit in edits)


def build_plan(chunks: Iterable[PackedChunk], device: torch.device | str = "cpu") -> EditPlan:
    """The edits of one packed forward.

    Requests that share an adapter and a strength share a :class:`RowEdit`, so an adapter's
    weights are read once a layer however many requests use it.
    """
    groups: dict[tuple[str, float, EditKey], tuple[Edit, list[int]]] = {}
    for chunk in chunks:
        prompt = chunk.edits
        if prompt is None or prompt.strength == 0:
            continue
        rows_by_positions: dict[tuple[int, ...], list[int]] = {}
        for key, edit in prompt.adapter.edits.items():
            positions = prompt.live_positions(key)
            if positions not in rows_by_positions:
                rows_by_positions[positions] = chunk.rows_of(positions)
            if rows := rows_by_positions[positions]:
                name = (prompt.adapter.digest, prompt.strength, key)
                groups.setdefault(name, (edit, []))[1].extend(rows)
    # Layers of one adapter mostly share their rows; so they share the index tensor too.
    tensors: dict[tuple[int, ...], Tensor] = {}
    layers: dict[int, list[RowEdit]] = defaultdict(list)
    for (_, strength, key), (edit, rows) in groups.items():
        index = tuple(rows)
        if index not in tensors:
            tensors[index] = torch.tensor(rows, dtype=torch.int64, device=device)
        layers[key.layer].append(RowEdit(edit, tensors[index], strength))
    return EditPlan(dict(layers))
