"""What travels with a request inside vLLM, once the front end has checked its adapters.

The engine's core needs the marks, for the keys of its KV blocks; the workers need the uses. So a
core never reads an adapter, and no position is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

KEY = "reft_admitted"
"""Of the document in ``extra_args``. Only the plugin may put it there."""

Run = tuple[int, int, str]
"""Positions start..end-1 of the prompt that the same edits act on, and the mark of those edits."""


@dataclass(frozen=True)
class Use:
    """One adapter as an admitted request uses it; see :class:`reft_core.batch.AdapterUse`."""

    digest: str
    strength: float
    subspaces: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Admitted:
    """A request's adapters, and the marks of the positions whose keys and values they change."""

    uses: tuple[Use, ...]
    runs: tuple[Run, ...]
    prompt_len: int
    """Tokens that the position rules were resolved against."""

    def to_extra_args(self) -> dict[str, Any]:
        """In a form that survives msgpack and pickle."""
        uses = [[use.digest, use.strength, dict(use.subspaces)] for use in self.uses]
        runs = [list(run) for run in self.runs]
        return {KEY: {"uses": uses, "runs": runs, "prompt_len": self.prompt_len}}


def runs_of(marks: Mapping[int, bytes]) -> tuple[Run, ...]:
    """Marks by position, with equal neighbours joined."""
    numbered = enumerate(sorted(marks))
    runs = groupby(numbered, key=lambda pair: (pair[1] - pair[0], marks[pair[1]]))
    found = []
    for (_, mark), pairs in runs:
        positions = [position for _, position in pairs]
        found.append((positions[0], positions[-1] + 1, mark.hex()))
    return tuple(found)


def admitted_uses(extra_args: Mapping[str, Any] | None) -> tuple[Use, ...]:
    """The adapters an admitted request uses; none for the base model."""
    document = (extra_args or {}).get(KEY)
    if document is None:
        return ()
    return tuple(
        Use(digest, strength, tuple(sorted(subspaces.items())))
        for digest, strength, subspaces in document["uses"]
    )


def admitted_prompt_len(extra_args: Mapping[str, Any] | None) -> int:
    """Tokens of an admitted request's prompt; 0 for the base model."""
    document = (extra_args or {}).get(KEY)
    return 0 if document is None else document["prompt_len"]


def admitted_runs(extra_args: Mapping[str, Any] | None) -> Iterable[Run]:
    """The marked positions of an admitted request, ascending; none for the base model."""
    document = (extra_args or {}).get(KEY)
    return () if document is None else document["runs"]
