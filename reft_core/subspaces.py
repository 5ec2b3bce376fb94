"""Named groups of a low-rank edit's ranks, which a request weighs one by one.

A group is written as ranges that end before their second number, as Python's do: ``0:4``, or
``0:2+6`` for ranks 0, 1 and 6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from reft_core.errors import InvalidRequest

_RANGE = re.compile(r"(\d{1,5})(?::(\d{1,5}))?", re.ASCII)
_FORM = "ranges of ranks such as 0:4 or 0:2+6"
MAX_SUBSPACES = 256


def parse_ranks(text: str) -> tuple[int, ...]:
    """The ranks that ``text`` names. Raises :class:`InvalidRequest` for another form."""
    ranks: list[int] = []
    for part in text.split("+"):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise InvalidRequest.because("subspaces", text, _FORM)
        first, end = int(found[1]), int(found[2] or int(found[1]) + 1)
        if end <= first:
            raise InvalidRequest.because("subspaces", text, f"{_FORM}, each with a rank in it")
        ranks += range(first, end)
    return tuple(ranks)


def parse_subspaces(text: str) -> dict[str, tuple[int, ...]]:
    """Groups by name, from text such as ``tone=0:4,topic=4:8``."""
    groups: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, equals, ranks = (piece.strip() for piece in part.partition("="))
        if not equals or not name or name in groups:
            raise InvalidRequest.because("subspaces", text, "name=ranks,…, each name once")
        groups[name] = parse_ranks(ranks)
    return groups


def check_subspaces(subspaces: Mapping[str, Sequence[int]], num_ranks: int) -> None:
    """Raise ValueError unless each rank is one of ``num_ranks`` and in one group at most."""
    for name, ranks in subspaces.items():
        if not ranks or not all(0 <= rank < num_ranks for rank in ranks):
            allowed = f"ranks 0 to {num_ranks - 1}" if num_ranks else "none: a site has no ranks"
            raise ValueError(f"subspaces.{name}: got {list(ranks)}, expected {allowed}")
    owned = [rank for ranks in subspaces.values() for rank in ranks]
    if len(set(owned)) != len(owned):
        raise ValueError(f"subspaces: got ranks {owned}, expected each rank at most once")
