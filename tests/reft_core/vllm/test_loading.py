"""Loading asks every worker of every data-parallel rank, and heeds all that they answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from reft_core.adapter import decode_adapter
from reft_core.errors import AdapterError
from reft_core.vllm.loading import load_adapter_async, unload_adapter_async
from tests.factories import random_adapter_bytes, tiny_description

DATA = random_adapter_bytes(tiny_description())
DIGEST = decode_adapter(DATA).digest


class Core:
    """A client of two ranks, with two workers each, of which the last one has no room."""

    def __init__(self, last: str) -> None:
        self.last = last
        self.asked: list[tuple[Any, ...]] = []

    async def call_utility_all_async(self, *asked: Any) -> list[list[str]]:
        self.asked.append(asked)
        return [[DIGEST, DIGEST], [DIGEST, self.last]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Digests in a catalog that has nothing against any adapter."""
    digests: set[str] = set()

    def add(data: bytes) -> str:
        digests.add(decode_adapter(data).digest)
        return DIGEST

    catalog = SimpleNamespace(check=lambda adapter: None, add=add, remove=digests.discard)
    monkeypatch.setattr("reft_core.vllm.loading.catalog_of", lambda engine: catalog)
    return digests


def test_a_refusal_of_any_rank_is_heard(served: set[str]) -> None:
    engine = SimpleNamespace(engine_core=Core("refused: no room"))
    with pytest.raises(AdapterError, match="refused: no room"):
        asyncio.run(load_adapter_async(engine, DATA))
    assert served == set()


def test_all_workers_are_asked_by_digest(served: set[str]) -> None:
    core = Core(DIGEST)
    engine = SimpleNamespace(engine_core=core)
    assert asyncio.run(load_adapter_async(engine, DATA)) == DIGEST
    assert served == {DIGEST}
    asyncio.run(unload_adapter_async(engine, DIGEST))
    assert served == set()
    assert [asked[:2] + asked[3:4] for asked in core.asked] == [
        ("collective_rpc", "reft_load", (DATA, DIGEST)),
        ("collective_rpc", "reft_unload", (DIGEST,)),
    ]
