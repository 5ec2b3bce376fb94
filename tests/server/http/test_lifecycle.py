"""Ready, draining, gone: what a server says and does at each."""

from __future__ import annotations

import signal
import threading

import httpx
import pytest

from server.http import readiness
from tests.server.conftest import ADMIN
from tests.server.fakes import MODEL, make_adapter, wait_until

ASK = {"model": MODEL.name, "prompt": "hi", "max_tokens": 5}


def test_ready_only_while_the_registry_answers(server, monkeypatch):
    monkeypatch.setattr(readiness, "_KEPT_S", 0)
    assert server.http.get("/readyz").status_code == 200

    def broken(**_):
        raise OSError("the database is gone")

    monkeypatch.setattr(server.services.registry, "all_current", broken)
    answer = server.http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "the registry does not answer"}
    assert server.http.get("/healthz").status_code == 200, "a restart would not help"
    metrics = server.http.get("/metrics").text
    assert f'reft_registry_up{{model_name="{MODEL.name}"}} 0.0' in metrics
    assert f'reft_ready{{model_name="{MODEL.name}"}} 0.0' in metrics
    monkeypatch.undo()
    monkeypatch.setattr(readiness, "_KEPT_S", 0)
    assert server.http.get("/readyz").status_code == 200


def test_a_registry_that_hangs_is_not_ready_and_is_asked_once(server, monkeypatch):
    monkeypatch.setattr(readiness, "_KEPT_S", 0)
    monkeypatch.setattr(readiness, "_PATIENCE_S", 0.05)
    release, calls = threading.Event(), []

    def hangs(**_):
        calls.append(1)
        assert release.wait(10)
        return []

    monkeypatch.setattr(server.services.registry, "all_current", hangs)
    for _ in range(3):
        assert server.http.get("/readyz").status_code == 503
    release.set()
    wait_until(lambda: server.http.get("/readyz").status_code == 200, "the registry to answer")
    assert calls[1:] == [1] * len(calls[1:])
    assert len(calls) <= 3, "one question at a time"


def test_an_answer_of_the_registry_counts_for_a_moment(server, monkeypatch):
    monkeypatch.setattr(readiness, "_KEPT_S", 3600)
    server.services.readiness._asked_at = float("-inf")
    calls = []
    real = server.services.registry.all_current
    monkeypatch.setattr(
        server.services.registry, "all_current", lambda **k: calls.append(1) or real(**k)
    )
    for path in ("/readyz", "/readyz", "/metrics"):
        server.http.get(path)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/admin/adapters/x")],
)
def test_a_signal_stops_admission_at_once(live, engine, method, path):
    """Before the event loop has even begun to drain."""
    engine.pause()
    live.services.lifecycle.refuse()
    answer = live.http.request(method, path, json=ASK, headers=ADMIN)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"]
    assert live.http.get("/healthz").status_code == 200
    assert live.http.get("/readyz").json() == {"status": "draining"}
    assert engine.submitted == []


def test_connections_stay_open_before(live):
    assert live.http.post("/v1/completions", json=ASK).headers.get("connection") != "close"


def test_a_request_that_has_not_reached_the_engine_is_finished_too(live, engine):
    """It came before the signal, and its adapter is still loading."""
    digest = live.upload("tone", make_adapter(1))["digest"]
    engine.load_gate = threading.Event()
    answers: list[httpx.Response] = []

    def ask():
        with httpx.Client(base_url=live.url, timeout=10) as client:
            answers.append(client.post("/v1/completions", json=ASK | {"model": "tone"}))

    client = threading.Thread(target=ask)
    client.start()
    wait_until(lambda: live.services.residency.num_users(digest) == 1, "the load to begin")
    live.uvicorn.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: live.uvicorn._draining is not None, "the end to begin")
    engine.load_gate.set()
    client.join(10)
    assert answers[0].status_code == 200, answers[0].text
    live.thread.join(10)
    assert not live.thread.is_alive()
