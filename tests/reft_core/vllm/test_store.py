"""A worker's adapters: what cannot be held or used is said, and nothing is raised into vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reft_core.adapter import Adapter, decode_adapter
from reft_core.errors import AdapterError
from reft_core.vllm.files import AdapterFiles
from reft_core.vllm.store import WorkerStore
from reft_core.vllm.worker import REFUSED, ReftWorker, check_loaded
from tests.factories import random_adapter_bytes, tiny_description

DATA = random_adapter_bytes(tiny_description())
DIGEST = decode_adapter(DATA).digest


def make_store(spool: Path, *places: str) -> WorkerStore:
    files = AdapterFiles(spool, 1 << 30, places)
    return WorkerStore(files, 1 << 30, {0, 1}, torch.device("cpu"), lambda adapter: None)


@pytest.fixture
def store(tmp_path: Path) -> WorkerStore:
    return make_store(tmp_path)


@pytest.fixture
def worker(store: WorkerStore) -> ReftWorker:
    found = ReftWorker()
    found.model_runner = SimpleNamespace(_reft=SimpleNamespace(store=store))
    return found


def full_device(_adapter: Adapter, _device: Any) -> Adapter:
    raise torch.OutOfMemoryError("no room")


def test_a_full_device_refuses_an_adapter(
    worker: ReftWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "to", full_device)
    assert worker.reft_load(DATA, DIGEST) == f"{REFUSED}no room"
    assert worker.reft_list() == []
    monkeypatch.undo()
    assert worker.reft_load(DATA, DIGEST) == DIGEST
    assert worker.reft_list() == [DIGEST]


def test_a_full_device_fails_those_who_need_it(
    store: WorkerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.load(DATA, DIGEST)
    store.unload(DIGEST)
    monkeypatch.setattr(Adapter, "to", full_device)
    assert store.get(DIGEST) is None
    monkeypatch.undo()
    assert store.get(DIGEST) is not None


def test_a_rank_that_joins_later_has_what_the_others_were_told(tmp_path: Path) -> None:
    """On their machine by the spool; on another one by a place that both can read."""
    place = tmp_path / "place"
    place.mkdir()
    first = make_store(tmp_path / "spool", str(place))
    first.load(DATA, DIGEST)
    joined = make_store(tmp_path / "spool").get(DIGEST)
    assert joined is not None
    assert joined.digest == DIGEST
    elsewhere = make_store(tmp_path / "other", str(place))
    assert elsewhere.get(DIGEST) is None
    (place / "a.safetensors").write_bytes(DATA)
    assert elsewhere.get(DIGEST) is not None


def test_loading_twice_is_loading_once(store: WorkerStore) -> None:
    store.load(DATA, DIGEST)
    before = store.resident_bytes
    store.load(DATA, DIGEST)
    assert store.resident_bytes == before > 0
    store.unload(DIGEST)
    assert store.resident_bytes == 0


def test_a_file_that_changed_on_its_way_is_refused(worker: ReftWorker) -> None:
    other = random_adapter_bytes(tiny_description(), seed=1)
    assert worker.reft_load(other, DIGEST).startswith(f"{REFUSED}body")
    assert worker.reft_list() == []


@pytest.mark.parametrize("answer", [f"{REFUSED}no room", "0" * 64])
def test_every_workers_answer_counts(answer: str) -> None:
    check_loaded([DIGEST] * 3, DIGEST)
    with pytest.raises(AdapterError, match=answer):
        check_loaded([DIGEST, DIGEST, answer], DIGEST)
