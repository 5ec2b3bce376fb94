"""Change, kill, look, restart, compare; again and again."""

from __future__ import annotations

import random
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos.backends import open_backend
from benchmarks.chaos.client import Client, look
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.process import KillableServer
from benchmarks.residency import adapter_files
from benchmarks.soak.world import save_tiny_model
from reft_core.loading import load_model
from server.registry import Catalog, open_store
from server.registry.check import Finding, RegistryCheck
from server.settings import Settings

_NAMES_PER_CLIENT = 3
_LEFTOVERS = ("stray file", "temporary file")
"""What a crash may leave; it is removed, and nobody ever sees it."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    kills: int = 200
    seed: int = 0
    backend: str = "sqlite"
    clients: int = 3
    longest_s: float = 1.5
    """A server lives between nothing and so long from its first request on."""


def run(options: Options) -> dict[str, Any]:
    """What came of it; ``problems`` are sentences."""
    began_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reft-chaos-") as folder:
        where = Path(folder)
        model = where / "tiny-llama"
        save_tiny_model(model, options.seed)
        with open_backend(options.backend, where) as backend:
            key = secrets.token_urlsafe(24)
            settings = {**backend, "admin_key": key, "registry_poll_s": 0.05, "delete_grace_s": 0}
            server = KillableServer(model, where / "server.log", settings)
            try:
                summary = _Run(options, server, settings, key, model).all()
            finally:
                server.kill()
    return {**summary, "seconds": round(time.monotonic() - began_at, 1)}


class _Run:
    """The state of a run."""

    def __init__(
        self,
        options: Options,
        server: KillableServer,
        settings: dict[str, Any],
        key: str,
        model: Path,
    ) -> None:
        self._options = options
        self._server = server
        self._key = key
        self._random = random.Random(options.seed)
        chosen = {name: value for name, value in settings.items() if name != "admin_key"}
        self._settings = Settings(**chosen)
        description = load_model(str(model)).description
        self._files: list[Iterator[bytes]] = [
            adapter_files(description, 2, [0], options.seed * 1000 + index)
            for index in range(options.clients)
        ]
        self._ledgers = [
            [Ledger(f"client-{i}-{j}") for j in range(_NAMES_PER_CLIENT)]
            for i in range(options.clients)
        ]
        self._counts: Counter[str] = Counter()
        self._acknowledged: Counter[str] = Counter()
        self._problems: list[str] = []

    def all(self) -> dict[str, Any]:
        """Every round, and an orderly end."""
        for _ in range(self._options.kills):
            self._live_and_die(self._server.start())
            self._check("after a crash", _LEFTOVERS)
        self._compare(self._server.start())
        status = self._server.stop()
        if status != 0:
            self._problems.append(f"the last server ended with {status}")
        self._check("at the end", ())
        return {
            "kills": self._options.kills,
            "lost_uploads": self._counts["lost"],
            "half_written": self._counts["half"],
            "inconsistent": self._counts["inconsistent"],
            "interrupted_changes": self._counts["interrupted"],
            "leftovers_removed": self._counts["leftovers"],
            "acknowledged": dict(self._acknowledged),
            "problems": self._problems,
        }

    def _live_and_die(self, url: str) -> None:
        """Compare what a server says with what was acknowledged, change names, and kill it."""
        self._compare(url)
        clients = [
            Client(url, self._key, ledgers, files, self._random.randrange(2**32))
            for ledgers, files in zip(self._ledgers, self._files, strict=True)
        ]
        for client in clients:
            client.start()
        time.sleep(self._random.uniform(0, self._options.longest_s))
        self._server.kill()
        for client in clients:
            client.join()
            self._acknowledged += client.acknowledged
            self._problems += client.problems
        doubts = [ledger.doubtful for ledgers in self._ledgers for ledger in ledgers]
        self._counts["interrupted"] += len(doubts) - doubts.count(None)

    def _compare(self, url: str) -> None:
        """Look at every name of a server that has just started."""
        headers = {"Authorization": f"Bearer {self._key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            for ledger in (each for ledgers in self._ledgers for each in ledgers):
                found, bad = look(http, ledger)
                self._counts["lost"] += ledger.lost(found)
                self._counts["half"] += len(bad)
                wrong = ledger.judge(found)
                self._counts["inconsistent"] += len(wrong)
                self._problems += bad + wrong

    def _check(self, when: str, expected: tuple[str, ...]) -> None:
        """What ``reft registry check --repair`` finds without a server, and then still finds."""
        for finding in self._find(repair=True):
            if finding.kind in expected:
                self._counts["leftovers"] += 1
            else:
                self._counts["half"] += 1
                self._problems.append(f"{when}: {finding.kind}: {finding.what}")
        self._problems += [f"not repaired: {finding}" for finding in self._find(repair=False)]

    def _find(self, *, repair: bool) -> list[Finding]:
        catalog = Catalog.at(self._settings.database)
        try:
            return list(RegistryCheck(catalog, open_store(self._settings)).run(repair=repair))
        finally:
            catalog.close()
