from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reft_core.errors import EngineOverloaded
from reft_core.spec import AdapterSpec
from server.adapters.pins import Pins
from server.app import create_app
from tests.server.conftest import ADMIN
from tests.server.fakes import FakeEngine, make_adapter, wait_until

MIB = 2**20


def users(server, name: str) -> int | None:
    (card,) = server.http.get(f"/admin/adapters/{name}", headers=ADMIN).json()["versions"][-1:]
    return card["num_users"]


def test_a_pinned_adapter_is_there_before_it_is_asked_for(in_process, engine, tmp_path):
    file = tmp_path / "one.safetensors"
    file.write_bytes(make_adapter(1, name="one"))
    with in_process(adapters=(file,), pinned_adapters=("one", "two")) as server:
        (first,) = engine.adapters
        assert users(server, "one") == 0
        second = server.upload("two", make_adapter(2))["digest"]
        server.upload("three", make_adapter(3))
        assert engine.adapters == {first, second}


def test_the_pin_follows_its_name(in_process, engine):
    with in_process(pinned_adapters=("tone",)) as server:
        residency = server.services.residency
        old = server.upload("tone", make_adapter(1))["digest"]
        new = server.upload("tone", make_adapter(2))["digest"]
        assert (residency.num_references, residency.num_pinned) == (1, 1)
        assert engine.adapters == {old, new}  # the old one until room is needed
        server.upload("voice", make_adapter(2))
        server.http.delete("/admin/adapters/tone", headers=ADMIN)
        assert (residency.num_references, residency.num_pinned) == (0, 0)
        assert engine.adapters == {new}


def test_an_upload_that_cannot_be_pinned_is_still_an_upload(in_process, engine, caplog):
    with in_process(pinned_adapters=("tone",)) as server:
        engine.load_failure = EngineOverloaded("no room")
        server.upload("tone", make_adapter(1))
        assert "could not be pinned" in caplog.text
        engine.load_failure = None
        answer = server.http.post("/v1/completions", json={"model": "tone", "prompt": "x"})
        assert answer.status_code == 200


def test_a_start_without_room_for_all_pins_says_so(in_process, tmp_path, monkeypatch):
    for index in range(2):
        data = make_adapter(index, name=f"a{index}")
        (tmp_path / f"{index}.safetensors").write_bytes(data)
    room = {"adapter_memory_bytes": MIB, "max_adapter_bytes": MIB // 2, "adapter_wait_s": 0}
    server = in_process(adapters=(tmp_path,), pinned_adapters=("a0", "a1"), **room)
    monkeypatch.setattr(AdapterSpec, "resident_bytes", lambda *_: MIB)
    with pytest.raises(EngineOverloaded, match="adapter memory is full"), server:
        pass


class SlowResidency:
    """Pins the first thing it is asked to once a gate is open."""

    def __init__(self) -> None:
        self.pinned: dict[str, str] = {}
        self.asked: list[str] = []
        self.gate = asyncio.Event()

    async def pin(self, name: str, digest: str, num_bytes: int) -> None:
        self.asked.append(digest)
        if len(self.asked) == 1:
            await self.gate.wait()
        self.pinned[name] = digest

    def unpin(self, name: str) -> None:
        self.pinned.pop(name, None)


def meanwhile(
    current: list[str], change: Callable[[Pins], Coroutine[Any, Any, None]]
) -> dict[str, str]:
    """What is pinned when ``change`` has come while the first version was loading."""

    def to_keep(_names: object) -> list[SimpleNamespace]:
        version = {"name": "tone", "tenant": "", "resident_bytes": 1}
        return [SimpleNamespace(digest=digest, **version) for digest in current[-1:]]

    async def run() -> dict[str, str]:
        residency = SlowResidency()
        pins = Pins(["tone"], SimpleNamespace(to_keep=to_keep), residency)
        first = asyncio.create_task(pins.refresh())
        while not residency.asked:
            await asyncio.sleep(0)
        second = asyncio.create_task(change(pins))
        for _ in range(10):
            await asyncio.sleep(0)
        residency.gate.set()
        await asyncio.gather(first, second)
        return residency.pinned

    return asyncio.run(run())


def test_of_two_uploads_at_once_the_later_stays_pinned():
    current = ["old"]

    async def upload(pins: Pins) -> None:
        current.append("new")
        await pins.refresh()

    assert meanwhile(current, upload) == {"tone": "new"}


def test_a_name_deleted_while_it_loads_is_not_kept():
    current = ["old"]

    async def delete(pins: Pins) -> None:
        current.clear()
        await pins.refresh()

    assert meanwhile(current, delete) == {}


def test_pinning_over_http_loads_follows_and_lasts(in_process, make_settings, loaded):
    pin = "/admin/adapters/tone/pin"
    with in_process() as server:
        assert server.http.put(pin, headers=ADMIN).status_code == 404
        server.upload("tone", make_adapter(1))
        assert server.http.put(pin, headers=ADMIN).json()["num_users"] == 0
        new = server.upload("tone", make_adapter(2))["digest"]
        assert server.services.residency.num_pinned == 1
        assert server.http.get("/admin/adapters/tone", headers=ADMIN).json()["pinned"]
    restarted = FakeEngine(loaded.tokenizer)
    app = create_app(make_settings(), restarted, loaded)
    with TestClient(app) as http:
        assert restarted.adapters == {new}
        assert http.delete(pin, headers=ADMIN).status_code == 200
        assert app.state.services.residency.num_pinned == 0
        assert not http.get("/admin/adapters/tone", headers=ADMIN).json()["pinned"]


def test_what_another_server_pinned_or_deleted_is_followed(in_process, engine):
    with in_process(registry_poll_s=0.02) as server:
        digest = server.upload("tone", make_adapter(1))["digest"]
        residency, registry = server.services.residency, server.services.registry
        registry.pin("tone", True)
        wait_until(lambda: engine.adapters == {digest}, "the pin to be followed")
        registry.delete("tone")
        wait_until(lambda: engine.adapters == set(), "the delete to be followed")
        assert residency.num_references == 0
