from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fastapi.testclient import TestClient
from openai import OpenAI

from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.loading import LoadedModel
from server.app import create_app
from server.http.run import DrainingServer
from server.services import Services
from server.settings import Settings
from tests.server.fakes import FakeEngine, make_loaded, make_tiny_loaded, wait_until
from tests.server.services import database_url, postgres, s3  # noqa: F401  # fixtures

ADMIN_KEY = "admin-key-for-tests"
API_KEY = "api-key-for-tests"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


# Through the standard library, where pytest's caplog sees it.
structlog.configure(
    processors=[structlog.stdlib.add_log_level, structlog.stdlib.render_to_log_kwargs],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings come from the test alone."""
    import os

    for name in [name for name in os.environ if name.startswith("REFT_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return make_loaded()


@pytest.fixture
def engine(loaded: LoadedModel) -> FakeEngine:
    return FakeEngine(loaded.tokenizer)


class Server:
    """A running server, in process or on a socket, with the fake engine behind it."""

    def __init__(self, services: Services, http: Any, url: str = "") -> None:
        self.services = services
        self.http = http
        self.url = url

    def openai(self, key: str = "none-needed") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        answer = self.http.post(f"/admin/adapters/{name}", content=data, headers=ADMIN)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()


@pytest.fixture
def make_settings(tmp_path: Path):
    def make(**changes: Any) -> Settings:
        defaults = {"data_dir": tmp_path / "data", "admin_key": ADMIN_KEY, "drain_timeout_s": 5}
        return Settings(**(defaults | changes))

    return make


@pytest.fixture
def in_process(make_settings, engine: FakeEngine, loaded: LoadedModel):
    """Context manager: the app without sockets, for whatever does not need them."""

    @contextmanager
    def run(**changes: Any) -> Iterator[Server]:
        app = create_app(make_settings(**changes), engine, loaded)
        with TestClient(app, raise_server_exceptions=False) as client:
            yield Server(app.state.services, client)

    return run


@pytest.fixture
def on_socket(make_settings, engine: FakeEngine, loaded: LoadedModel):
    """Context manager: the app in a real uvicorn on a free port, in a thread."""

    @contextmanager
    def run(**changes: Any) -> Iterator[Server]:
        settings = make_settings(port=0, **changes)
        app = create_app(settings, engine, loaded)
        urls: list[str] = []
        uvicorn = DrainingServer(app, settings, urls.append)
        thread = threading.Thread(target=uvicorn.run, name="uvicorn")
        thread.start()
        wait_until(lambda: bool(urls), "the server to listen")
        with httpx.Client(base_url=urls[0], timeout=10) as client:
            server = Server(app.state.services, client, urls[0])
            server.uvicorn = uvicorn
            server.thread = thread
            try:
                yield server
            finally:
                engine.resume()
                uvicorn.handle_exit(15, None)
                thread.join(15)
                assert not thread.is_alive(), "the server did not end"

    return run


@pytest.fixture
def server(in_process) -> Iterator[Server]:
    with in_process() as running:
        yield running


@pytest.fixture
def live(on_socket) -> Iterator[Server]:
    with on_socket() as running:
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Server]:
    """The app over the embedded engine and a tiny random model that reads bytes."""
    loaded = make_tiny_loaded()
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=512, max_prefill_tokens=16))
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("tiny"), admin_key=ADMIN_KEY, max_grammar_bytes=4096
    )
    app = create_app(settings, engine, loaded)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Server(app.state.services, client)
