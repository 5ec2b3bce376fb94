"""Adapters reach the device whole, and nothing reads or drops one that is still on its way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.uploads import Uploads, packed
from tests.factories import (
    Recorder,
    assert_close,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    tiny_description,
    tiny_loaded,
)
from tests.reference.slow import reference_generate

PARAMS = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def some_adapters() -> list[Adapter]:
    model = tiny_description()
    return [
        random_adapter(model, seed=1, positions="f2+l2", tied=False),
        random_adapter(model, seed=2, method="red", rank=0),
        random_adapter(model, seed=3, method="lora", sites=("linear:self_attn.v_proj",)),
        random_adapter(model, seed=4, activation="relu"),
        random_prefix_adapter(model, "kv"),
        random_prefix_adapter(model, "embedding"),
    ]


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    found = {
        f"{key}.{part}": tensor
        for key, edit in adapter.edits.items()
        for part, tensor in edit.parts()
    }
    return found | (adapter.prefix.tensors() if adapter.prefix else {})


def assert_same(found: Adapter, expected: Adapter) -> None:
    """Equal in everything, tensors compared on the CPU."""
    assert (found.spec, found.digest, found.num_bytes) == (
        expected.spec,
        expected.digest,
        expected.num_bytes,
    )
    for key, edit in expected.edits.items():
        other = found.edits[key]
        assert (other.activation, other.scale, other.source) == (
            edit.activation,
            edit.scale,
            edit.source,
        )
    one, other_tensors = tensors_of(found), tensors_of(expected)
    assert one.keys() == other_tensors.keys()
    for name, tensor in one.items():
        assert_close(tensor.cpu(), other_tensors[name], tolerance=0)


@pytest.mark.parametrize("place", range(6))
def test_packing_keeps_every_number(place: int) -> None:
    adapter = some_adapters()[place]
    moved: list[Tensor] = []

    def move(flat: Tensor) -> Tensor:
        moved.append(flat.clone())
        return moved[0]

    found = packed(adapter, move)
    assert_same(found, adapter.to("cpu"))
    assert len(moved) == 1, "one copy"
    storage = moved[0].untyped_storage().data_ptr()
    for tensor in tensors_of(found).values():
        assert tensor.untyped_storage().data_ptr() == storage
        assert tensor.storage_offset() % 64 == 0
        assert tensor.is_contiguous()


class Arrival:
    """Stands for the end of a copy."""

    def __init__(self, events: list[str], digest: str) -> None:
        self._events = events
        self._digest = digest

    def wait(self, _stream: Any) -> None:
        self._events.append(self._digest)


def engine_with_slow_uploads(events: list[str]) -> EmbeddedEngine:
    engine = EmbeddedEngine(tiny_loaded(), EngineConfig(max_model_len=48))
    uploads = Uploads(torch.device("cpu"))
    uploads.start = lambda adapter: (  # type: ignore[method-assign]
        adapter.to("cpu"),
        Arrival(events, adapter.digest),
    )
    uploads._main = None  # type: ignore[assignment]
    engine._uploads = uploads
    return engine


def test_the_first_request_has_its_adapter_waited_for() -> None:
    events: list[str] = []
    engine = engine_with_slow_uploads(events)
    one, other = some_adapters()[:2]
    engine.load_adapter(one)
    engine.load_adapter(other)
    engine.load_adapter(one)
    assert events == []
    for number, digest in enumerate([one.digest, one.digest, other.digest]):
        request = Request(str(number), random_prompt(5), PARAMS, (AdapterChoice(digest),))
        engine.submit(request, Recorder())
    engine.submit(Request("base", random_prompt(5), PARAMS), Recorder())
    assert events == [one.digest, other.digest]


def test_one_that_is_dropped_unused_is_waited_for() -> None:
    events: list[str] = []
    engine = engine_with_slow_uploads(events)
    adapter = some_adapters()[0]
    engine.load_adapter(adapter)
    engine.unload_adapter(adapter.digest)
    engine.unload_adapter(adapter.digest)
    assert events == [adapter.digest]
    engine.load_adapter(adapter)
    assert events == [adapter.digest]


def test_one_that_comes_twice_at_once_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the two copies is dropped."""
    events: list[str] = []
    engine = engine_with_slow_uploads(events)
    adapter = some_adapters()[0]
    monkeypatch.setattr(engine, "has_adapter", lambda _digest: False)
    engine.load_adapter(adapter)
    engine.load_adapter(adapter)
    assert events == [adapter.digest]


def test_a_cpu_needs_no_waiting() -> None:
    adapter = some_adapters()[0]
    found, arrival = Uploads(torch.device("cpu")).start(adapter)
    assert arrival is None
    assert_same(found, adapter.to("cpu"))


@pytest.mark.gpu
def test_on_a_gpu_an_upload_arrives_whole() -> None:
    uploads = Uploads(torch.device("cuda", 0))
    for adapter in some_adapters():
        found, arrival = uploads.start(adapter)
        uploads.add(adapter.digest, arrival)
        uploads.wait(adapter.digest)
        assert all(tensor.is_cuda for tensor in tensors_of(found).values())
        assert_same(found, adapter.to("cpu"))


@pytest.mark.gpu
def test_on_a_gpu_adapters_come_and_go_while_requests_run() -> None:
    """More adapters than stay loaded, each used as soon as it is there."""
    loaded = tiny_loaded()
    expected_model = tiny_loaded().model
    loaded.model.to("cuda")
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=48, max_num_seqs=4))
    engine.start()
    try:
        for seed in range(12):
            adapter = random_adapter(engine.model, seed=seed, positions="f2+l2", size=2.0)
            engine.load_adapter(adapter)
            prompt = random_prompt(9, seed)
            request = Request(str(seed), prompt, PARAMS, (AdapterChoice(adapter.digest),))
            (completion,) = generate(engine, [request])
            engine.unload_adapter(adapter.digest)
            assert completion.token_ids == reference_generate(expected_model, prompt, 4, adapter)
    finally:
        engine.stop()
