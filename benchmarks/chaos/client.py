"""A client that changes one name after another at random, until its server is gone."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx

from benchmarks.chaos.ledger import Ledger, State


class Client(threading.Thread):
    """Changes its own names over HTTP; nobody else does."""

    def __init__(
        self, url: str, key: str, ledgers: list[Ledger], files: Iterator[bytes], seed: int
    ) -> None:
        super().__init__(name="chaos-client")
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60
        )
        self._ledgers = ledgers
        self._files = files
        self._random = random.Random(seed)
        self.acknowledged: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self) -> None:
        """Change names until the connection fails."""
        try:
            while True:
                self._change(self._random.choice(self._ledgers))
        except httpx.TransportError:
            pass
        finally:
            self._http.close()

    def _change(self, ledger: Ledger) -> None:
        """One change: its outcome is in doubt from before it is sent until it is answered."""
        path, state = f"/admin/adapters/{ledger.name}", ledger.state
        others = sorted(state.versions.keys() - {state.current})
        choice = self._random.random()
        if state.current is None or choice < 0.5:
            data = next(self._files)
            digest = hashlib.sha256(data).hexdigest()
            after = ledger.uploaded(digest)
            self._send(ledger, "upload", after, "POST", path, content=data)
        elif choice < 0.7 and others:
            number = self._random.choice(others)
            target = f"{path}/versions/{number}/promote"
            self._send(ledger, "promote", state.pointed(number), "POST", target)
        elif choice < 0.8 and state.previous is not None:
            after = state.pointed(state.previous)
            self._send(ledger, "rollback", after, "POST", f"{path}/rollback")
        elif choice < 0.92 and others:
            number = self._random.choice(others)
            after = ledger.without(number)
            self._send(ledger, "delete", after, "DELETE", f"{path}/versions/{number}")
        elif choice > 0.94:
            self._send(ledger, "delete", State(), "DELETE", path)

    def _send(
        self, ledger: Ledger, action: str, after: State, method: str, path: str, **body: Any
    ) -> None:
        ledger.doubtful = after
        answer = self._http.request(method, path, **body)
        if not answer.is_success:
            self.problems.append(f"{method} {path}: {answer.status_code} {answer.text}")
            ledger.doubtful = None
            return
        self.acknowledged[action] += 1
        ledger.settle(after)


def look(http: httpx.Client, ledger: Ledger) -> tuple[State, list[str]]:
    """What a name means, and which of its files are not whole."""
    path = f"/admin/adapters/{ledger.name}"
    answer = http.get(path)
    if answer.status_code == 404:
        return State(), []
    detail = answer.raise_for_status().json()
    versions = {card["version"]: card["digest"] for card in detail["versions"]}
    bad = []
    for number, digest in versions.items():
        file = http.get(f"{path}@{number}/file")
        if not file.is_success or hashlib.sha256(file.content).hexdigest() != digest:
            bad.append(f"{ledger.name}@{number}: {file.status_code}, not the bytes of {digest}")
    return State(versions, detail["current"], detail["previous"]), bad
