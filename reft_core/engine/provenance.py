"""What a sequence's keys and values were made from: the names of its prefix-cache blocks.

The keys and values at position p depend on the tokens up to p and on the edits that acted at
positions up to p, on nothing else. So a block of tokens is named by a hash chain over its
tokens and over a *mark* for each edited position: which adapter, at which strength, with which
parameters. Positions that nothing edits have no mark. It follows that

- blocks before the first edited position have the base model's names, whatever the adapter;
- two versions, strengths or subspaces of one adapter never meet;
- a longer prompt does not take the blocks at a shorter one's suffix, because the positions that
  were edited there are not edited in it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reft_core.batch import AdapterUse, PromptEdits

BLOCK_TOKENS = 16
"""Tokens of a full block. Within a block, sharing goes token by token; see PrefixCache."""

Item = tuple[int, bytes]
"""A token and the mark of its position."""

_HASH_BYTES = 16


@dataclass
class Provenance:
    """The block names of one sequence, in the order of its positions."""

    root: bytes
    """What everything depends on: the tenant's salt, and an adapter's virtual tokens."""
    marks: Mapping[int, bytes] = field(default_factory=dict)
    """By edited position of the prompt."""
    prompt_end: int = 0
    """First position after the prompt, virtual tokens counted in."""
    generated_mark: bytes = b""
    """Of every position from ``prompt_end`` on."""
    _names: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, edits: PromptEdits | None, prompt_len: int, salt: str = "") -> Provenance:
        """The provenance of a request with this salt."""
        prefixed = edits.prefixed if edits else None
        root = _hash(salt.encode(), b"" if prefixed is None else prefixed.digest.encode())
        if edits is None:
            return cls(root, prompt_end=prompt_len)
        marks: dict[int, bytes] = {}
        generated = b""
        for place, use in edits.active():
            identity = _identity(use)
            for unit in edits.units_behind_kv(place):
                mark = identity + unit.to_bytes(2, "little")
                for position in edits.positions[place][unit]:
                    marks[position] = marks.get(position, b"") + mark
                if use.edits_decode and unit == use.adapter.rule.num_units - 1:
                    generated += mark
        return cls(root, marks, edits.num_virtual + prompt_len, generated)

    def items(self, token_ids: Sequence[int], start: int, end: int) -> tuple[Item, ...]:
        """Tokens and marks of positions start..end-1."""
        return tuple((token_ids[at], self._mark(at)) for at in range(start, end))

    def block_names(self, token_ids: Sequence[int], num_blocks: int) -> Sequence[bytes]:
        """Names of the first ``num_blocks`` full blocks of ``token_ids``."""
        for index in range(len(self._names), num_blocks):
            block = range(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
            tokens = token_ids[block.start : block.stop]
            is_plain = block.stop <= self.prompt_end and self.marks.keys().isdisjoint(block)
            marks = [] if is_plain else [self._mark(position) for position in block]
            self._names.append(_name(self.parent_of(index), tokens, marks))
        return self._names[:num_blocks]

    def num_same(self, other: Provenance, token_ids: Sequence[int], length: int) -> int:
        """How many of the first ``length`` positions have the same keys and values under both;
        their tokens are the same, ``token_ids``."""
        if self.root != other.root:
            return 0
        num_full = length // BLOCK_TOKENS
        names = [each.block_names(token_ids, num_full) for each in (self, other)]
        start = num_common(*names) * BLOCK_TOKENS
        rest = range(start, min(start + BLOCK_TOKENS, length))
        return next((at for at in rest if self._mark(at) != other._mark(at)), rest.stop)

    def parent_of(self, index: int) -> bytes:
        """Name of what stands before block ``index``; the earlier names must be known."""
        return self._names[index - 1] if index else self.root

    def _mark(self, position: int) -> bytes:
        return self.generated_mark if position >= self.prompt_end else self.marks.get(position, b"")


def name_of(parent: bytes, items: Sequence[Item]) -> bytes:
    """Name of a block, full or not, that follows ``parent``."""
    return _name(parent, [token for token, _ in items], [mark for _, mark in items])


def _name(parent: bytes, tokens: Sequence[int], marks: Sequence[bytes]) -> bytes:
    marked = b""
    if any(marks):
        marked = b"".join(
            offset.to_bytes(2, "little") + len(mark).to_bytes(4, "little") + mark
            for offset, mark in enumerate(marks)
            if mark
        )
    return _hash(parent, array("q", tokens).tobytes(), marked)


def _identity(use: AdapterUse) -> bytes:
    """Which function a use of an adapter computes, its unit left open."""
    return _hash(repr(use.identity).encode())


def num_common(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of the common beginning."""
    at, end, stride, has_failed = 0, min(len(left), len(right)), 16, False
    while at < end and stride:
        stop = min(at + stride, end)
        if left[at:stop] == right[at:stop]:  # many times faster than a loop over items
            at = stop
            stride = stride if has_failed else 2 * stride
        else:
            has_failed = True
            stride = (stop - at) // 2
    return at


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
