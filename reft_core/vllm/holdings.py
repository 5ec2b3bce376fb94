"""The adapter files that vLLM's workers hold, each for as long as somebody needs it."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable


class Holdings:
    """Files by digest, with the number of those who need each. Thread-safe.

    Two adapters may be one file to the workers, as it is written anew for them: where another
    program wrote the adapters' own, these may differ in what means nothing.
    """

    def __init__(self, send: Callable[[bytes], None], drop: Callable[[str], None]) -> None:
        """``send`` has every worker hold a file and returns then. ``drop`` has them hold the file
        of a digest no longer, after what they were sent before, and waits for nothing."""
        self._send = send
        self._drop = drop
        self._lock = threading.Lock()
        self._num_users: Counter[str] = Counter()
        self._held: set[str] = set()

    def load(self, file: bytes) -> str:
        """Have the workers hold a file, for the caller; returns its digest. Raises what ``send``
        raises, and then nobody needs it on the caller's behalf."""
        digest = hashlib.sha256(file).hexdigest()
        with self._lock:
            self._num_users[digest] += 1
            is_held = digest in self._held
        if not is_held:
            try:
                self._send(file)
            except BaseException:
                self.let_go([digest])
                raise
            with self._lock:
                self._held.add(digest)
        return digest

    def need(self, digests: Iterable[str]) -> None:
        """Somebody else needs these files, which are held."""
        with self._lock:
            self._num_users.update(digests)

    def let_go(self, digests: Iterable[str]) -> None:
        """Somebody needs these files no longer; those that nobody needs are dropped."""
        with self._lock:
            for digest in digests:
                self._num_users[digest] -= 1
                if not self._num_users[digest]:
                    del self._num_users[digest]
                    self._held.discard(digest)
                    self._drop(digest)
