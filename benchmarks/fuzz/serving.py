"""The server under attack, on a real port of this machine, and how it is found to be at rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from benchmarks.fuzz.base import good_files, tiny_loaded
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from server.app import create_app
from server.http.run import DrainingServer
from server.settings import Settings

API_KEY = "api-key-under-attack"
ADMIN_KEY = "admin-key-under-attack"
SIGTERM = 15
_START_TIMEOUT_S = 60
_REST_TIMEOUT_S = 30
_BODY_BYTES = 64 * 1024


@dataclass(frozen=True)
class Target:
    """A running server."""

    app: FastAPI
    url: str
    models: tuple[str, ...]
    """Names that requests may use, first that of the base model."""
    vocab_size: int

    def leftovers(self) -> list[str]:
        """What the server still holds once it has had time to rest; empty if all is well."""
        give_up_at = time.monotonic() + _REST_TIMEOUT_S
        while (found := self._held()) and time.monotonic() < give_up_at:
            time.sleep(0.05)
        return found

    def _held(self) -> list[str]:
        services = self.app.state.services
        stats = services.engine.stats()
        held = {
            "requests running": stats.num_running,
            "requests waiting": stats.num_waiting,
            "tokens in the key-value store": stats.kv_tokens_used,
            "uses of adapters": sum(
                services.residency.num_users(version.digest) or 0
                for version in services.registry.all_current()
            ),
        }
        found = [f"{count} {what}" for what, count in held.items() if count]
        return found if services.engine.healthy else [*found, "a dead engine"]

    def is_alive(self) -> bool:
        """Whether it answers, and answers a request that needs the engine."""
        headers = {"Authorization": f"Bearer {API_KEY}"}
        body = {"model": self.models[0], "prompt": "hello", "max_tokens": 2}
        with httpx.Client(base_url=self.url, timeout=30) as http:
            healthy = http.get("/healthz").status_code == 200
            answer = http.post("/v1/completions", json=body, headers=headers)
        return healthy and answer.status_code == 200


@contextmanager
def serving(folder: Path, **changes: Any) -> Iterator[Target]:
    """A server with keys, and with adapters of every kind that it can serve."""
    loaded = tiny_loaded()
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=96, max_num_seqs=8, num_threads=1))
    fields: dict[str, Any] = {
        "data_dir": folder / "data",
        "api_key": API_KEY,
        "admin_key": ADMIN_KEY,
        "port": 0,
        "max_model_len": 96,
        "max_body_bytes": _BODY_BYTES,
        "max_adapter_bytes": _BODY_BYTES,
        "max_grammar_bytes": 4096,
        "grammar_timeout_s": 1.0,
        "request_timeout_s": 30.0,
        "drain_timeout_s": 5.0,
    }
    settings = Settings(**(fields | changes))
    app = create_app(settings, engine, loaded)
    urls: list[str] = []
    listening = threading.Event()

    def on_ready(url: str) -> None:
        urls.append(url)
        listening.set()

    server = DrainingServer(app, settings, on_ready)
    thread = threading.Thread(target=server.run, name="server-under-attack")
    thread.start()
    try:
        if not listening.wait(_START_TIMEOUT_S):
            raise RuntimeError("the server did not start")
        models = _register(urls[0], loaded.description.name)
        yield Target(app, urls[0], models, loaded.description.vocab_size)
    finally:
        server.handle_exit(SIGTERM, None)
        thread.join()


def _register(url: str, base: str) -> tuple[str, ...]:
    """Upload every good file; the names of all models."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    names = [base]
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        for good in good_files():
            if good.serves:
                answer = http.post(f"/admin/adapters/{good.name}", content=good.data)
                answer.raise_for_status()
                names.append(good.name)
    return tuple(names)
