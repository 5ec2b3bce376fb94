"""A client that leaves frees its slot within one step of the engine, counted in steps."""

from __future__ import annotations

import json
import threading

import httpx
import pytest

from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from server.app import create_app
from server.http.run import DrainingServer
from tests.server.fakes import make_tiny_loaded, wait_until


class GatedEngine(EmbeddedEngine):
    """The embedded engine, whose steps a test allows one by one, and counts."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.allowed = threading.Semaphore(0)
        self.num_steps = 0

    def step(self) -> None:
        self.allowed.acquire()
        super().step()
        self.num_steps += 1

    def run_steps(self, count: int) -> None:
        end = self.num_steps + count
        self.allowed.release(count)
        wait_until(lambda: self.num_steps == end, "the steps to be done")


@pytest.fixture
def gated(make_settings):
    loaded = make_tiny_loaded()
    engine = GatedEngine(loaded, EngineConfig(max_model_len=256, max_num_seqs=2))
    settings = make_settings(port=0, drain_timeout_s=0)
    urls: list[str] = []
    server = DrainingServer(create_app(settings, engine, loaded), settings, urls.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: bool(urls), "the server to listen")
    yield engine, urls[0]
    server.handle_exit(15, None)
    engine.allowed.release(10_000)
    thread.join(15)
    assert not thread.is_alive()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_slot_is_free_one_step_after_its_client_left(gated, num_tokens):
    """While its prompt is prefilled, or in the middle of its stream."""
    engine, url = gated
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=url, timeout=20) as client:
        if num_tokens:
            engine.allowed.release(num_tokens)
            with client.stream("POST", "/v1/completions", json=body | {"n": 2}) as stream:
                lines = stream.iter_lines()  # once it is collected, the connection is closed
                assert json.loads(next(lines).removeprefix("data: "))["choices"]
                wait_until(lambda: engine.num_steps == num_tokens, "the steps")
                assert engine.stats().num_running == 2
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body | {"n": 2}, timeout=0.3)
    wait_until(lambda: len(engine._cancelled) == 2, "the cancellations to arrive")
    before = engine.stats()
    engine.run_steps(1)
    after = engine.stats()
    assert (after.num_running, after.num_waiting) == (0, 0)
    assert after.generated_tokens_total == before.generated_tokens_total
    assert after.prompt_tokens_total == before.prompt_tokens_total
