"""The vLLM engine where it differs from the embedded one: what it refuses, and how it dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from reft_core.adapter import decode_adapter
from reft_core.engine.interface import AdapterChoice
from reft_core.errors import EngineUnavailable, InvalidRequest, RequestFailed, UnsupportedFeature
from reft_core.vllm.admission import catalog_of
from reft_core.vllm.loading import ask_workers
from tests.conformance.lab import WAIT_S, Lab, greedy, make_lab
from tests.factories import random_adapter, random_prefix_adapter, random_prompt, shift_adapter
from tests.vllm.tiny import TinyWorld

SHORT = random_prompt(5)


@pytest.fixture(scope="module")
def lab(world: TinyWorld) -> Iterator[Lab]:
    lab = make_lab("vllm", world)
    try:
        lab.engine.start()
        yield lab
    finally:
        lab.engine.stop()


def held(lab: Lab) -> set[str]:
    """Digests of the files that every worker holds."""
    engine: Any = lab.engine
    first, *others = engine._loop.call(ask_workers(engine._delivery.llm, "reft_list"), WAIT_S)
    assert all(other == first for other in others)
    return set(first)


def spaced(file: bytes) -> bytes:
    """An adapter's file with other spaces in its metadata."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    (key,) = header["__metadata__"]
    header["__metadata__"][key] = json.dumps(json.loads(header["__metadata__"][key]), indent=1)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


async def no_answer(llm: Any, file: bytes) -> None:
    """Like workers that die before they answer."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_virtual_tokens_are_for_the_embedded_engine(lab: Lab, kind: Any) -> None:
    adapter = random_prefix_adapter(lab.world.description, kind)
    with pytest.raises(UnsupportedFeature, match=r"prefix: .*embedded engine"):
        lab.engine.load_adapter(adapter)
    assert not lab.engine.has_adapter(adapter.digest)


def test_edits_of_generated_tokens_are_for_the_embedded_engine(lab: Lab) -> None:
    adapter = random_adapter(lab.world.description, positions="prompt", phase="all")
    with pytest.raises(UnsupportedFeature, match=r"phase.*embedded engine"):
        lab.engine.load_adapter(adapter)


def test_sites_that_are_not_armed_are_named(lab: Lab) -> None:
    adapter = random_adapter(lab.world.description, sites=("mlp_output",))
    with pytest.raises(UnsupportedFeature, match="mlp_output"):
        lab.engine.load_adapter(adapter)


def test_constrained_answers_need_a_tokenizer(lab: Lab) -> None:
    class AnyToken:
        lark = "start: /.*/"
        is_finished = False

        def allowed(self) -> torch.Tensor:
            return torch.ones(96, dtype=torch.bool)

        def accept(self, token_id: int) -> None:
            pass

    with pytest.raises(UnsupportedFeature, match="embedded engine") as caught:
        lab.submit(SHORT, greedy(1), constraint=AnyToken())
    assert caught.value.field == "constraint"


def test_workers_hold_what_is_loaded_and_no_more(lab: Lab) -> None:
    """Both come and go with the engine's own calls; a second load sends nothing."""

    before = held(lab)
    lab.load("last", "bent")
    lab.load("last")
    digests = {lab.adapters[name].digest for name in ("last", "bent")}
    assert digests <= held(lab)
    for digest in digests:
        lab.engine.unload_adapter(digest)
    assert held(lab) == before


def test_adapters_that_are_one_to_the_workers_leave_one_by_one(lab: Lab) -> None:
    """Files that differ in the spaces of their metadata: workers get the same for both."""
    before, prompt = held(lab), random_prompt(9)
    file = lab.world.files["prompt"]
    twins = [decode_adapter(file), decode_adapter(spaced(file))]
    assert len({twin.digest for twin in twins}) == 2
    for twin in twins:
        lab.engine.load_adapter(twin)
    assert len(held(lab) - before) == 1
    lab.engine.unload_adapter(twins[0].digest)
    assert len(held(lab) - before) == 1
    answer = lab.run(prompt, greedy(6), AdapterChoice(twins[1].digest))
    assert answer.token_ids == lab.expected(prompt, 6, ("prompt", 1.0))
    lab.engine.unload_adapter(twins[1].digest)
    assert held(lab) == before


def test_what_vllm_refuses_is_about_the_field_that_it_names(lab: Lab) -> None:
    """Here an adapter that its front end lost, behind the engine's back."""
    engine: Any = lab.engine
    lab.load("bent")
    catalog = catalog_of(engine._delivery.llm)
    catalog.remove(lab.adapters["bent"].digest)
    error = lab.run(SHORT, greedy(1), lab.choice("bent")).error
    catalog.add(lab.world.files["bent"])
    assert isinstance(error, InvalidRequest)
    assert error.field == "adapter"
    assert str(error).startswith("vLLM refused the request: adapter: got '")
    assert "parameter=" not in str(error)
    assert lab.run(SHORT, greedy(1), lab.choice("bent")).error is None


@pytest.mark.parametrize("rest", [{}, {"completion": (5, 6)}])
def test_what_fails_in_its_last_step_is_an_error(lab: Lab, rest: dict[str, Any]) -> None:
    adapter = shift_adapter(lab.world.description, shift=3e38, gain=3e38)
    lab.engine.load_adapter(adapter)
    (output,) = lab.run(SHORT, greedy(1), AdapterChoice(adapter.digest), **rest).outputs
    assert isinstance(output.error, RequestFailed)
    assert output.token is None


def test_a_dead_engine_says_so_to_everybody(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test here: one of vLLM's processes is killed."""
    engine: Any = lab.engine
    sinks = [lab.submit(SHORT, greedy(450))[1] for _ in range(6)]
    sinks[0].wait(3)
    assert engine.healthy
    monkeypatch.setattr("reft_core.vllm.engine.load_adapter_async", no_answer)
    with ThreadPoolExecutor() as pool:
        loading = pool.submit(lab.load, "last")
        for process in engine._delivery.llm.engine_core.resources.engine_manager.processes:
            process.kill()
        with pytest.raises(EngineUnavailable):
            loading.result(WAIT_S)
    for sink in sinks:
        last = sink.wait().outputs[-1]
        assert last.finish_reason == "error"
        assert isinstance(last.error, EngineUnavailable)
        assert sum(output.finish_reason is not None for output in sink.outputs) == 1
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        lab.submit(SHORT, greedy(1))
    with pytest.raises(EngineUnavailable, match="has ended"):
        lab.load("last")
    engine.cancel("r0")
    assert engine.drain(0) is True
    engine.stop()
    with pytest.raises(EngineUnavailable, match="has ended"):
        lab.load("last")
    engine.unload_adapter(lab.adapters["bent"].digest)
