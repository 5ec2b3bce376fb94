"""Keys and values of prompts seen before, shared by every request they are true for.

Holds copies in blocks of :data:`BLOCK_TOKENS` tokens, named by their provenance, so a hit is
exact whatever adapters are in play. Slots stay contiguous: a hit is copied into the sequence's
slot, which costs about a hundredth of computing it. Belongs to the engine's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from reft_core.engine.kv import SlotKV
from reft_core.engine.provenance import BLOCK_TOKENS, Item, Provenance, name_of, num_common
from reft_core.engine.sequence import Sequence

LEAST_MATCH = BLOCK_TOKENS
"""Fewest tokens worth taking. Nearly all prompts share their first token with some other."""
_MOST_SIBLINGS = 16
"""Blocks with one parent and one first token that are compared token by token."""


@dataclass(frozen=True)
class _Block:
    """A full block, or a prompt's last tokens."""

    name: bytes
    parent: bytes
    items: tuple[Item, ...]
    row: int
    """Row of the pool that holds its keys and values."""
    left_by: tuple[str, ...]
    """Digests of the adapters of the request that it was computed for."""


class PrefixCache:
    """Least recently used blocks go first, the later ones of a prompt before the earlier."""

    def __init__(self, kv: SlotKV, budget_bytes: int) -> None:
        self._kv = kv
        num_rows = budget_bytes // kv.bytes_of(BLOCK_TOKENS)
        self._pool = kv.like(num_rows, BLOCK_TOKENS)
        self._free = list(range(num_rows))
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()  # least recently used first
        self._siblings: dict[tuple[bytes, Item], OrderedDict[bytes, _Block]] = {}
        self.num_rows = num_rows
        self.num_foreign_tokens = 0
        """Restored tokens that a request with other adapters, or with none, had left."""

    def __len__(self) -> int:
        """Blocks held, full or not."""
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that may be stored before one has to go."""
        return len(self._free)

    def num_known(self, names: Seq[bytes]) -> int:
        """How many of the first of these blocks are held."""
        return next((i for i, name in enumerate(names) if name not in self._blocks), len(names))

    def restore(self, sequence: Sequence, beyond: int = 0) -> int:
        """Fill the start of a sequence's slot with what is known, and return how many tokens.

        Nothing, and 0, if not more than ``beyond`` are known. Positions whose logits are wanted
        are left to compute.
        """
        provenance = sequence.provenance
        if provenance is None:
            return 0
        path = self._match(provenance, sequence.token_ids)
        length = min(sum(shared for _, shared in path), sequence.first_read)
        if length < max(LEAST_MATCH, sequence.num_virtual + 1, beyond + 1):
            return 0
        rows = torch.tensor([block.row for block, _ in path], device=self._pool.device)
        blocks = self._pool.all.index_select(2, rows)  # (2, layers, n, KH, BLOCK, D)
        joined = blocks.transpose(2, 3).flatten(3, 4)  # (2, layers, KH, n·BLOCK, D)
        self._kv.all[:, :, sequence.slot, :, :length] = joined[..., :length, :]
        self._touch([block for block, _ in path])
        self.num_foreign_tokens += _num_foreign(path, sequence, length)
        return length

    def store(self, sequence: Sequence, *, tail: bool) -> None:
        """Keep what a sequence's slot holds; with ``tail`` also a last block that is not full."""
        provenance = sequence.provenance
        if provenance is None or not self.num_rows:
            return
        num_full, rest = divmod(sequence.num_computed, BLOCK_TOKENS)
        names = provenance.block_names(sequence.token_ids, num_full)
        held = [self._blocks[name] for name in names if name in self._blocks]
        kept = {block.row for block in held}
        fresh: list[tuple[int, _Block]] = []
        for index in range(num_full + (tail and rest > 0)):
            if index < num_full and names[index] in self._blocks:
                continue
            start = index * BLOCK_TOKENS
            items = provenance.items(
                sequence.token_ids, start, min(start + BLOCK_TOKENS, sequence.num_computed)
            )
            block = self._insert(provenance.parent_of(index), items, kept, sequence.adapters)
            if block is None:
                continue
            kept.add(block.row)
            fresh.append((index, block))
        self._touch([*held, *(block for _, block in fresh)])
        self._copy_in(sequence, fresh)

    def forget(self, sequence: Sequence) -> None:
        """Drop every block of a sequence, because its numbers cannot be trusted."""
        if sequence.provenance is None:
            return
        provenance, token_ids = sequence.provenance, sequence.token_ids
        num_full = len(token_ids) // BLOCK_TOKENS
        provenance.block_names(token_ids, num_full)
        for index in range(num_full + 1):
            start = index * BLOCK_TOKENS
            for first in provenance.items(token_ids, start, min(start + 1, len(token_ids))):
                for block in self._begun_with(provenance.parent_of(index), first):
                    self._drop(block)

    def _match(self, provenance: Provenance, token_ids: Seq[int]) -> list[tuple[_Block, int]]:
        """The blocks a sequence can start with, and how many tokens of each."""
        num_full = len(token_ids) // BLOCK_TOKENS
        names = provenance.block_names(token_ids, num_full)
        num_known = self.num_known(names)
        path = [(self._blocks[name], BLOCK_TOKENS) for name in names[:num_known]]
        start = num_known * BLOCK_TOKENS
        rest = provenance.items(token_ids, start, min(start + BLOCK_TOKENS, len(token_ids)))
        if not rest:
            return path
        compared = self._begun_with(provenance.parent_of(num_known), rest[0])[-_MOST_SIBLINGS:]
        best = max(compared, key=lambda block: num_common(block.items, rest), default=None)
        return path if best is None else [*path, (best, num_common(best.items, rest))]

    def _begun_with(self, parent: bytes, first: Item) -> list[_Block]:
        """The blocks after ``parent`` that begin with this token, latest last."""
        siblings = self._siblings.get((parent, first))
        return [] if siblings is None else list(siblings.values())

    def _insert(
        self, parent: bytes, items: tuple[Item, ...], kept: set[int], left_by: tuple[str, ...]
    ) -> _Block | None:
        """A row for a new block. None if it is known, or only ``kept`` rows could give way."""
        for other in self._begun_with(parent, items[0]):
            shared = num_common(other.items, items)
            if shared == len(items):
                return None  # a longer block, or the same, says all of it
            if shared == len(other.items):
                self._drop(other)  # this one says all of the other, and more
        if not self._free and not self._evict(kept):
            return None
        block = _Block(name_of(parent, items), parent, items, self._free.pop(), left_by)
        self._blocks[block.name] = block
        self._siblings.setdefault((parent, items[0]), OrderedDict())[block.name] = block
        return block

    def _copy_in(self, sequence: Sequence, fresh: list[tuple[int, _Block]]) -> None:
        """Copy blocks from a slot into the pool; the unused end of a last one is arbitrary."""
        if not fresh:
            return
        device = self._pool.device
        indices = torch.tensor([index for index, _ in fresh], device=device)
        rows = torch.tensor([block.row for _, block in fresh], device=device)
        starts = indices * BLOCK_TOKENS
        at = starts.unsqueeze(1) + torch.arange(BLOCK_TOKENS, device=device)  # (n, BLOCK)
        at = at.clamp(max=sequence.num_computed - 1).flatten()
        tokens = self._kv.all[:, :, sequence.slot].index_select(3, at)
        blocks = tokens.unflatten(3, (len(fresh), BLOCK_TOKENS)).transpose(2, 3)
        self._pool.all.index_copy_(2, rows, blocks)  # (2, layers, n, KH, BLOCK, D)

    def _touch(self, path: Seq[_Block]) -> None:
        """Mark blocks as used now, a prompt's first ones last, so that those stay longest."""
        for block in reversed(path):
            self._blocks.move_to_end(block.name)

    def _evict(self, kept: set[int]) -> bool:
        """Drop the least recently used block that is not to be kept; False if there is none."""
        victim = next((block for block in self._blocks.values() if block.row not in kept), None)
        if victim is not None:
            self._drop(victim)
        return victim is not None

    def _drop(self, block: _Block) -> None:
        del self._blocks[block.name]
        key = (block.parent, block.items[0])
        del self._siblings[key][block.name]
        if not self._siblings[key]:
            del self._siblings[key]
        self._free.append(block.row)


def _num_foreign(path: Seq[tuple[_Block, int]], sequence: Sequence, length: int) -> int:
    """How many of the first ``length`` tokens come from blocks that others' adapters left,
    those not counted that the sequence's slot had before."""
    first, adapters = sequence.num_computed, sequence.adapters
    return sum(
        max(0, min(index * BLOCK_TOKENS + shared, length) - max(index * BLOCK_TOKENS, first))
        for index, (block, shared) in enumerate(path)
        if block.left_by != adapters
    )
