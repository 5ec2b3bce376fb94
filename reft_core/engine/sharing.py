"""What the sequences of one step have in common, so that it is computed once.

Two sequences of one tenant that begin with the same tokens have in common

- the positions before the first where a token or an edit differs: everything, at every layer;
- the positions after that, up to the first where a token differs: the layers below the lowest
  that an edit of either changes. They are the *trunk*.

So a chunk may follow another one, its lead: where it does, it has no rows of its own, and the
lead's keys and values are copied into its slot. :func:`lay_out` says which rows a forward has.
They grow in number at each stage where a trunk ends. A stage s is the point after layer s - 1,
before the edits of that layer's output; only forwards that are written for it can branch there.

Counts tokens and layers; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property

from reft_core.engine.provenance import num_common
from reft_core.engine.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens start..end-1 of a sequence, to be prefilled in this step."""

    sequence: Sequence
    start: int
    end: int
    lead: Lead | None = None
    """What of it is computed for another chunk of this step, an earlier one."""

    @property
    def completes_prompt(self) -> bool:
        """Whether the sequence's next token can be sampled after this chunk."""
        return self.end == self.sequence.prefill_target

    @property
    def wants_token(self) -> bool:
        """Whether a token is to be sampled after this chunk."""
        return self.completes_prompt and self.sequence.request.params.max_tokens > 0

    @property
    def scored(self) -> range:
        """Positions whose logits tell the log-probability of the prompt's next token."""
        sequence = self.sequence
        if not sequence.is_scoring:
            return range(0)
        return range(max(self.start, sequence.first_read), min(self.end, sequence.prompt_end - 1))

    @property
    def num_shared(self) -> int:
        """Tokens of which nothing is computed for this sequence."""
        return 0 if self.lead is None else self.lead.same - self.start

    def alone(self) -> Chunk:
        """The same tokens, all computed for this sequence."""
        return replace(self, lead=None)


@dataclass(frozen=True, eq=False)
class Lead:
    """Another chunk that a chunk follows, from the chunk's start on."""

    chunk: Chunk
    same: int
    """Positions before it are the lead's at every layer."""
    alike: int
    """Positions before it are the lead's in the first ``depth`` layers."""
    depth: int

    def saved(self, start: int, num_layers: int) -> int:
        """Rows times layers that a chunk from ``start`` on does not compute."""
        return (self.same - start) * num_layers + (self.alike - self.same) * self.depth

    def up_to(self, end: int) -> Lead:
        """The same for a chunk that ends there."""
        return replace(self, same=min(self.same, end), alike=min(self.alike, end))


@dataclass(frozen=True)
class Common:
    """What two sequences have in common; see the module."""

    same: int = 0
    alike: int = 0
    depth: int = 0
    is_twin: bool = False
    """Whether they have the same edits at the same positions, so also the same logits."""


def common(one: Sequence, other: Sequence) -> Common:
    """What two sequences have in common, wherever they stand."""
    mine, theirs = one.provenance, other.provenance
    if mine is None or theirs is None or mine.root != theirs.root:
        return Common()
    alike = num_common(one.token_ids, other.token_ids)
    if not alike:
        return Common()
    same = mine.num_same(theirs, one.token_ids, alike)
    stages = [sequence.edits.first_stage for sequence in (one, other) if sequence.edits]
    depth = min((stage for stage in stages if stage is not None), default=0)
    return Common(same, alike, depth, _identity(one) == _identity(other))


def find_lead(
    sequence: Sequence,
    chunks: Iterable[tuple[Chunk, Common]],
    num_layers: int,
    branching: bool,
) -> Lead | None:
    """The chunk that saves a sequence most if it is followed; None if none saves anything.

    ``chunks`` come with what their sequences have in common with this one.

    Without ``branching`` there is no trunk. A row whose logits are read is followed only where
    they are the same too, and not for the log-probabilities of a prompt.
    """
    start, target = sequence.num_computed, sequence.prefill_target
    best: Lead | None = None
    most = (0, False)
    for chunk, found in chunks:
        if not chunk.start <= start < chunk.end:
            continue
        end = min(chunk.end, target)
        is_twin = found.is_twin and not sequence.is_scoring
        same = max(start, min(found.same, end if is_twin else min(end, sequence.first_read)))
        alike = max(same, min(found.alike, end)) if branching and found.depth else same
        lead = Lead(chunk, same, alike, found.depth)
        saved = (lead.saved(start, num_layers), found.is_twin)
        if saved > most and saved[0] > 0:
            best, most = lead, saved
    return best


@dataclass(frozen=True)
class Own:
    """Positions first..end-1 of a chunk are rows row, row + 1, … of a forward's level."""

    row: int
    first: int
    end: int


@dataclass(frozen=True)
class Level:
    """The rows of a forward from one stage on."""

    stage: int
    own: tuple[Own, ...]
    """The rows of each chunk."""
    taken: tuple[int, ...]
    """For each row, which one of the level before it goes on; empty in the first level."""

    @property
    def num_rows(self) -> int:
        """Rows of all chunks."""
        return sum(own.end - own.first for own in self.own)


@dataclass(frozen=True)
class Layout:
    """Which rows a forward over some chunks has, level by level."""

    chunks: Seq[Chunk]
    levels: tuple[Level, ...]

    @property
    def first(self) -> Level:
        """The rows that the forward begins with."""
        return self.levels[0]

    @property
    def last(self) -> Level:
        """The rows that it ends with."""
        return self.levels[-1]

    @cached_property
    def _index(self) -> dict[int, int]:
        return {id(chunk): i for i, chunk in enumerate(self.chunks)}

    def row_of(self, level: Level, chunk: Chunk, position: int) -> int:
        """Where a position of a chunk is computed, be it for the chunk or for its lead."""
        own = level.own[self._index[id(chunk)]]
        if position >= own.first:
            return own.row + position - own.first
        assert chunk.lead is not None, "a chunk without a lead computes all its positions"
        return self.row_of(level, chunk.lead.chunk, position)

    def rows_at(self, level: Level) -> tuple[int, ...]:
        """For each row of the last level, the one of ``level`` that it comes from."""
        return _rows_at(self, level, self.last)


def lay_out(chunks: Seq[Chunk]) -> Layout:
    """The rows of a forward over ``chunks``, each after its lead."""
    leads = [chunk.lead for chunk in chunks if chunk.lead is not None]
    stages = sorted({0} | {lead.depth for lead in leads if lead.alike > lead.same})
    levels: list[Level] = []
    for stage in stages:
        own, row = [], 0
        for chunk in chunks:
            own.append(Own(row, _first_own(chunk, stage), chunk.end))
            row += chunk.end - own[-1].first
        level = Level(stage, tuple(own), ())
        if levels:
            so_far = Layout(chunks, tuple(levels))
            level = replace(level, taken=_rows_at(so_far, levels[-1], level))
        levels.append(level)
    return Layout(chunks, tuple(levels))


def _first_own(chunk: Chunk, stage: int) -> int:
    """The first position that is computed for a chunk, from a stage on."""
    if chunk.lead is None:
        return chunk.start
    return chunk.lead.same if stage >= chunk.lead.depth else chunk.lead.alike


def _rows_at(layout: Layout, level: Level, later: Level) -> tuple[int, ...]:
    """For each row of ``later``, the one of ``level`` that it comes from."""
    return tuple(
        layout.row_of(level, chunk, position)
        for chunk, own in zip(layout.chunks, later.own, strict=True)
        for position in range(own.first, own.end)
    )


def _identity(sequence: Sequence) -> object:
    """Equal for sequences with the same edits at the same positions of their prompts."""
    return sequence.edits.identity if sequence.edits else ()
