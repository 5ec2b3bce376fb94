"""What a name may have meant while a request was under way."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Change:
    """A name is given a file, or deleted."""

    digest: str | None
    began_at: float
    ended_at: float = math.inf


class NameHistory:
    """The changes of one name, which never overlap."""

    def __init__(self) -> None:
        self._changes = [Change(None, -math.inf, -math.inf)]

    def begin(self, digest: str | None, now: float) -> Change:
        """Note that a change is on its way; set its ``ended_at`` once it is confirmed."""
        assert self._changes[-1].ended_at < math.inf, "one change at a time"
        self._changes.append(Change(digest, now))
        return self._changes[-1]

    @property
    def current(self) -> str | None:
        """What it means once the last change has ended."""
        return self._changes[-1].digest

    def possible(self, since: float, until: float) -> set[str | None]:
        """What a request sent at ``since`` and answered at ``until`` may have found.

        A change takes effect somewhere between its beginning and its end.
        """
        found = set()
        followers = [*self._changes[1:], None]
        for change, follower in zip(self._changes, followers, strict=True):
            replaced_at = math.inf if follower is None else follower.ended_at
            if change.began_at <= until and replaced_at >= since:
                found.add(change.digest)
        return found
