"""The plan: which rows of a forward get which edits.

A prefill forward packs chunks of many prompts into one (N, d) tensor. Each request's edited
positions were fixed at admission from its whole prompt; here they become row numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from reft_core.adapter import Adapter, EditKey
from reft_core.edits import Edit

_READ_BY_LOGITS_ONLY = ("block_output", "attn_output", "mlp_output", "heads")
"""Sites whose output at a position is, in the last layer, read by that position alone."""


@dataclass(frozen=True, eq=False)
class AdapterUse:
    """One adapter as one request uses it."""

    adapter: Adapter
    """With its tensors on the engine's device."""
    strength: float = 1.0
    subspaces: tuple[tuple[str, float], ...] = ()
    """Factor of each named subspace; when any is given, ranks outside of them are off."""
    source: tuple[int, ...] = ()
    """Source prompt of an interchange, in tokens; without one its source states are zero."""
    source_parts: dict[EditKey, Tensor] = field(default_factory=dict)
    """s·R (K, r) for the K positions of each interchange, float32. The runner puts them here
    once, before the request's first chunk."""

    @property
    def interchanges(self) -> list[EditKey]:
        """The edits that take states of the source prompt; none without a source."""
        sites = self.adapter.spec.sites
        return [key for key in self.edits if self.source and sites[key.site].interchange]

    @property
    def identity(self) -> tuple[str, float, tuple[tuple[str, float], ...]]:
        """Equal for uses that compute the same function, an interchange's source aside."""
        return self.adapter.digest, self.strength, self.subspaces

    @cached_property
    def edits_decode(self) -> bool:
        """Whether it edits generated tokens too."""
        return any(site.phase == "all" for site in self.adapter.spec.sites.values())

    def decode_keys(self) -> list[EditKey]:
        """The edits that act on generated tokens: sites of phase ``all``, and of a rule whose
        units are untied, the last one's parameters."""
        sites, last_unit = self.adapter.spec.sites, self.adapter.rule.num_units - 1
        return [
            key for key in self.edits if sites[key.site].phase == "all" and key.unit == last_unit
        ]

    @cached_property
    def edits(self) -> Mapping[EditKey, Edit]:
        """The adapter's edits with the subspace factors worked in."""
        if not self.subspaces:
            return self.adapter.edits
        named = self.adapter.spec.subspaces or {}
        scaled = {}
        for key, edit in self.adapter.edits.items():
            factors = torch.zeros(edit.rank)
            for name, factor in self.subspaces:
                factors[list(named[name])] = factor
            scaled[key] = edit.scale_ranks(factors)
        return scaled


@dataclass(frozen=True)
class PromptEdits:
    """A request's adapters resolved against its prompt, at admission. Travels with it.

    Chunking, preemption and recompute cannot move the positions: they are absolute, and
    computed once from the original prompt length. Adapters of a stack act in order: where
    two edit the same site and position, the second reads what the first wrote.
    """

    uses: tuple[AdapterUse, ...]
    prompt_len: int
    """Tokens of the request's own prompt."""
    reads: Literal["last", "all"] = "last"
    """Positions whose last-layer output is read: the last one's, for the next token's logits,
    or all of them, as by an encoder's head or a decoder's cross-attention."""

    @cached_property
    def prefixed(self) -> Adapter | None:
        """The adapter whose virtual tokens stand before the prompt; at most one has any."""
        return next((use.adapter for use in self.uses if use.adapter.num_virtual_tokens), None)

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before the prompt; they shift its positions."""
        return 0 if self.prefixed is None else self.prefixed.num_virtual_tokens

    @cached_property
    def positions(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Ascending edited positions of each adapter's units, virtual tokens counted in."""
        return tuple(
            tuple(
                tuple(position + self.num_virtual for position in unit)
                for unit in use.adapter.rule.resolve(self.prompt_len)
            )
            for use in self.uses
        )

    def active(self) -> Iterator[tuple[int, AdapterUse]]:
        """The adapters that change anything, with their place in the stack."""
        return ((i, use) for i, use in enumerate(self.uses) if use.strength != 0)

    def live_positions(self, place: int, key: EditKey) -> tuple[int, ...]:
        """Positions where the edit at ``key`` of the ``place``-th adapter can matter.

        Nothing reads a causal model's last layer but the logits, and only the last prompt
        token's logits are read, so a last-layer edit lives at that position alone.
        """
        positions = self.positions[place][key.unit]
        if self.reads == "all" or not self._only_for_logits(place, key):
            return positions
        last = self.num_virtual + self.prompt_len - 1
        return (last,) if last in positions else ()

    def units_behind_kv(self, place: int) -> set[int]:
        """Units of the ``place``-th adapter that change keys or values, at any layer."""
        edits = self.uses[place].adapter.edits
        return {key.unit for key in edits if not self._only_for_logits(place, key)}

    def _only_for_logits(self, place: int, key: EditKey) -> bool:
        """Whether the model's logits at an edited position are all that the edit can change."""
        last_layer = self.uses[place].adapter.spec.base.num_layers - 1
        return key.layer == last_layer and key.site in _READ_BY_LOGITS_ONLY

    @cached_property
    def first_stage(self) -> int | None:
        """Layers, from the bottom, that compute at every position what the base model does;
        None if all do, and their outputs and the logits are the base model's too. Virtual
        tokens do not count as edits."""
        stages = (stage_of(key.layer, key.site) for _, use in self.active() for key in use.edits)
        return min(stages, default=None)

    @cached_property
    def identity(self) -> tuple[object, ...]:
        """Equal for edits that do the same at the same positions; empty if they do nothing."""
        uses = tuple(use.identity for _, use in self.active())
        return (*uses, self.num_virtual + self.prompt_len) if uses else ()

    @cached_property
    def num_edits(self) -> int:
        """(layer, site, position) triples changed in the prompt, dead ones left out."""
        return sum(
            len(self.live_positions(place, key))
            for place, use in self.active()
            for key in use.edits
        )

    @cached_property
    def edits_decode(self) -> bool:
        """Whether generated tokens are edited too."""
        return any(use.edits_decode for _, use in self.active())


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

    def rows_from(self, position: int) -> list[int]:
        """Rows of the positions from this one on that lie in this chunk."""
        first = max(position - self.first_position, 0)
        return list(range(self.row + first, self.row + self.length))

    def position_of(self, row: int) -> int:
        """The position that stands in a row of this chunk."""
        return self.first_position + row - self.row


@dataclass(frozen=True)
class RowEdit:
    """One edit and the rows of the forward it changes."""

    edit: Edit
    rows: Tensor
    """(K,) int64, unique, on the engine's device."""
    strength: float
    depth: int | None = None
    """Place in its request's stack. Edits of one depth change different rows, so they may be
    applied in any order, or together. None: nothing is known of its neighbours."""


Place = tuple[int, str]
"""A layer and a site in it."""


def stage_of(layer: int, site: str) -> int:
    """How many layers, from the bottom, an edit at this place leaves as they are.

    An edit of a layer's output does not change what that layer computed, nor its keys and
    values; one inside a layer does.
    """
    return layer + 1 if site == "block_output" else layer


@dataclass(frozen=True)
class EditPlan:
    """By layer and site, the edits to apply to that site's packed output, in order."""

    places: Mapping[Place, list[RowEdit]] = field(default_factory=dict)

    @property
    def num_edits(self) -> int:
        """(layer, site, row) triples the plan changes."""
        return sum(len(edit.rows) for edits in self.places.values() for edit in edits)

    def between(self, first_stage: int, end_stage: int | None, rows: Tensor | None) -> EditPlan:
        """The edits from one stage on and before another, if there is one.

        Row i of the plan is row ``rows[i]`` there, or row i without ``rows``.
        """
        moved: dict[int, Tensor] = {}  # layers of an adapter mostly share their rows

        def move(edit: RowEdit) -> RowEdit:
            if rows is None:
                return edit
            if id(edit.rows) not in moved:
                moved[id(edit.rows)] = rows[edit.rows]
            return replace(edit, rows=moved[id(edit.rows)])

        return EditPlan(
            {
                place: [move(edit) for edit in edits]
                for place, edits in self.places.items()
                if first_stage <= stage_of(*place)
                and (end_stage is None or stage_of(*place) < end_stage)
            }
        )


@dataclass(frozen=True)
class Narrowing:
    """A layer that goes on with few of its rows, since nothing is read of the others."""

    layer: int
    places: Mapping[int, int]
    """Where each row that goes on is among those that do."""


class _PlanBuilder:
    """Collects rows by edit. Requests that share an adapter share a :class:`RowEdit`, so an
    adapter's weights are read once a layer however many requests use it.
    """

    def __init__(self, narrowing: Narrowing | None = None) -> None:
        self._narrowing = narrowing
        self._rows: dict[tuple[int, AdapterUse, EditKey], list[int]] = {}
        self._canonical: dict[object, AdapterUse] = {}
        self._own: list[tuple[int, EditKey, tuple[int, ...], Edit, float]] = []

    def add(self, depth: int, use: AdapterUse, key: EditKey, rows: list[int]) -> None:
        """Have the edit ``key`` of ``use``, ``depth``-th in its stack, change these rows."""
        rows = [row for _, row in self._going_on(key, rows)]
        if rows:
            shared = self._canonical.setdefault(use.identity, use)
            self._rows.setdefault((depth, shared, key), []).extend(rows)

    def add_own(
        self, depth: int, use: AdapterUse, key: EditKey, rows: list[int], source_part: Tensor
    ) -> None:
        """Have an interchange change these rows. It shares its rows with no other request.

        With s·R (K, r) as the bias of each row, (s·R − h·R)·Rᵀ is the canonical edit.
        """
        if pairs := self._going_on(key, rows):
            parts, new_rows = zip(*pairs, strict=True)
            edit = replace(use.edits[key], bias=source_part[list(parts)])
            self._own.append((depth, key, new_rows, edit, use.strength))

    def _going_on(self, key: EditKey, rows: list[int]) -> list[tuple[int, int]]:
        """Of these rows those that are there at ``key``: their places in the list, and what they
        are called there."""
        narrowing = self._narrowing
        if narrowing is None or key.layer != narrowing.layer:
            return list(enumerate(rows))
        places = narrowing.places
        return [(i, places[row]) for i, row in enumerate(rows) if row in places]

    def build(self, device: torch.device | str) -> EditPlan:
        """The plan. Layers of one adapter mostly share their rows, so also the index tensor."""
        shared = [
            (depth, key, tuple(rows), use.edits[key], use.strength)
            for (depth, use, key), rows in self._rows.items()
        ]
        entries = sorted(shared + self._own, key=lambda e: e[0])
        tensors = _index_tensors({rows for _, _, rows, _, _ in entries}, device)
        places: dict[Place, list[RowEdit]] = defaultdict(list)
        for depth, key, rows, edit, strength in entries:
            row_edit = RowEdit(edit, tensors[rows], strength, depth)
            places[key.layer, key.site].append(row_edit)
        return EditPlan(dict(places))


def _index_tensors(
    indices: Collection[tuple[int, ...]], device: torch.device | str
) -> dict[tuple[int, ...], Tensor]:
    """Each index as an int64 tensor, all of them parts of one that is copied to the device once."""
    joined = torch.tensor([row for index in indices for row in index], dtype=torch.int64)
    parts = joined.to(device).split([len(index) for index in indices])
    return dict(zip(indices, parts, strict=True))


def build_plan(
    chunks: Iterable[PackedChunk],
    device: torch.device | str = "cpu",
    narrowing: Narrowing | None = None,
) -> EditPlan:
    """The edits of one packed prefill, perhaps narrowed at its last layer.

    A chunk may reach beyond the prompt, when a sequence that had generated tokens is computed
    again; those tokens are edited as they were in their decode steps.
    """
    builder = _PlanBuilder(narrowing)
    for chunk in chunks:
        if chunk.edits is None:
            continue
        rows_by_positions: dict[tuple[int, ...], list[int]] = {}
        for depth, use in chunk.edits.active():
            for key in use.edits:
                positions = chunk.edits.live_positions(depth, key)
                if positions not in rows_by_positions:
                    rows_by_positions[positions] = chunk.rows_of(positions)
                rows = rows_by_positions[positions]
                if rows and key in use.source_parts:
                    paired = chunk.edits.positions[depth][key.unit]
                    places = [paired.index(chunk.position_of(row)) for row in rows]
                    builder.add_own(depth, use, key, rows, use.source_parts[key][places])
                elif rows:
                    builder.add(depth, use, key, rows)
            if generated := chunk.rows_from(chunk.edits.num_virtual + chunk.edits.prompt_len):
                for key in use.decode_keys():
                    builder.add(depth, use, key, generated)
    return builder.build(device)


def build_decode_plan(
    rows: Iterable[PromptEdits | None], device: torch.device | str = "cpu"
) -> EditPlan:
    """The edits of one decode step, row i being sequence i's new token.

    See :meth:`AdapterUse.decode_keys`. None for rows without adapters.
    """
    builder = _PlanBuilder()
    for row, edits in enumerate(rows):
        if edits is None or not edits.edits_decode:
            continue
        for depth, use in edits.active():
            for key in use.decode_keys():
                builder.add(depth, use, key, [row])
    return builder.build(device)
