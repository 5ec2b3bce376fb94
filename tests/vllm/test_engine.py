"""The vLLM engine where it differs from the embedded one: what it refuses, and how it dies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from reft_core.engine.interface import AdapterChoice
from reft_core.errors import EngineUnavailable, RequestFailed, UnsupportedFeature
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

    def held() -> list[list[str]]:
        engine: Any = lab.engine
        return engine._loop.call(engine._llm.collective_rpc("reft_list"), WAIT_S)

    before = held()
    lab.load("last", "bent")
    lab.load("last")
    digests = {lab.adapters[name].digest for name in ("last", "bent")}
    assert all(digests <= set(of_one) for of_one in held())
    for digest in digests:
        lab.engine.unload_adapter(digest)
    assert held() == before


@pytest.mark.parametrize("rest", [{}, {"completion": (5, 6)}])
def test_what_fails_in_its_last_step_is_an_error(lab: Lab, rest: dict[str, Any]) -> None:
    adapter = shift_adapter(lab.world.description, shift=3e38, gain=3e38)
    lab.engine.load_adapter(adapter)
    (output,) = lab.run(SHORT, greedy(1), AdapterChoice(adapter.digest), **rest).outputs
    assert isinstance(output.error, RequestFailed)
    assert output.token is None


def test_a_dead_engine_says_so_to_everybody(lab: Lab) -> None:
    """The last test here: one of vLLM's processes is killed."""
    engine: Any = lab.engine
    sinks = [lab.submit(SHORT, greedy(450))[1] for _ in range(6)]
    sinks[0].wait(3)
    assert engine.healthy
    for process in engine._llm.engine_core.resources.engine_manager.processes:
        process.kill()
    for sink in sinks:
        last = sink.wait().outputs[-1]
        assert last.finish_reason == "error"
        assert isinstance(last.error, EngineUnavailable)
        assert sum(output.finish_reason is not None for output in sink.outputs) == 1
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        lab.submit(SHORT, greedy(1))
    engine.cancel("r0")
    assert engine.drain(0) is True
