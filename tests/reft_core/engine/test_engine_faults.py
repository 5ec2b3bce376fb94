"""One request that fails leaves its neighbours and successors as they were."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Sequence
from typing import get_args

import pytest
import torch

from reft_core.engine.config import Forward
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Output, Request
from reft_core.engine.kv import SlotKV
from reft_core.engine.runner import ModelRunner
from reft_core.engine.scheduler import Chunk
from reft_core.engine.sequence import Sequence as EngineSequence
from reft_core.errors import (
    DeadlineExceeded,
    RequestFailed,
)
from tests.factories import (
    Recorder,
    random_adapter,
    random_prompt,
    tiny_description,
)
from tests.reft_core.engine.engines import (
    GREEDY,
    LONG,
    SHORT,
    assert_idle,
    expected,
    greedy,
    make_engine,
    mild_adapter,
    poison,
    poison_of_decode,
    poison_of_prefix,
    submit,
)
from tests.reft_core.engine.stepping import finish, step_until


def poison_fails(engine: EmbeddedEngine) -> None:
    """Prefilled at once, and refused by the sampler."""
    victim = submit(engine, "poisoned", random_prompt(20), GREEDY, poison())
    finish(engine, victim)
    assert isinstance(victim.error, RequestFailed)
    assert "not finite" in str(victim.error)
    assert victim.tokens == []


def poison_is_cancelled(engine: EmbeddedEngine) -> None:
    """Half of its prompt is prefilled; nobody has looked at its numbers yet."""
    victim = submit(engine, "poisoned", random_prompt(20), GREEDY, poison())
    step_until(engine, lambda: engine.stats().num_running == 2)
    engine.step()
    engine.cancel("poisoned")
    finish(engine, victim)
    assert victim.finish_reason == "cancelled"


def poison_moves_and_fails(engine: EmbeddedEngine) -> None:
    """Half prefilled it moves into the slot of one that ends, and fails there."""
    first = submit(engine, "first", SHORT, greedy(2))
    victim = submit(engine, "poisoned", random_prompt(20), GREEDY, poison())
    finish(engine, first)
    assert victim.finish_reason is None
    assert engine.stats().num_running == 2
    finish(engine, victim)
    assert isinstance(victim.error, RequestFailed)


def poison_moves_as_it_fails(engine: EmbeddedEngine) -> None:
    """In the very step that finds it out, one before it ends and it moves there first."""
    first = submit(engine, "first", SHORT, greedy(1))
    victim = submit(engine, "poisoned", random_prompt(5), GREEDY, poison())
    engine.step()
    assert first.finish_reason == "length"
    assert isinstance(victim.error, RequestFailed)


def poison_ends_unseen(engine: EmbeddedEngine) -> None:
    """A sink that raises at the error ends like any other."""

    def broken(output: Output) -> None:
        raise RuntimeError("client gone")

    choice = AdapterChoice(poison().digest)
    request = Request("poisoned", random_prompt(20), GREEDY, (choice,))
    engine.submit(request, broken)
    step_until(engine, lambda: engine.stats().num_waiting + engine.stats().num_running == 1)


def poison_comes_with_its_prefix(engine: EmbeddedEngine) -> None:
    """Its virtual tokens must be zeroed as well."""
    victim = submit(engine, "poisoned", random_prompt(20), GREEDY, poison_of_prefix())
    finish(engine, victim)
    assert isinstance(victim.error, RequestFailed)
    assert victim.tokens == []


def poison_comes_in_decode(engine: EmbeddedEngine) -> None:
    """Its first token is fine, and its second is NaN, in a batch with the neighbour's."""
    prompt = random_prompt(20)
    victim = submit(engine, "poisoned", prompt, GREEDY, poison_of_decode())
    finish(engine, victim)
    assert isinstance(victim.error, RequestFailed)
    assert victim.token_ids == expected(prompt, greedy(1))


POISONINGS = [
    poison_comes_with_its_prefix,
    poison_comes_in_decode,
    poison_fails,
    poison_is_cancelled,
    poison_moves_and_fails,
    poison_moves_as_it_fails,
    poison_ends_unseen,
]


def run_after_poison(
    way: Callable[[EmbeddedEngine], None], forward: str
) -> tuple[Recorder, list[Recorder]]:
    """A long neighbour that decodes throughout, and short requests in every other slot after."""
    engine = make_engine(
        poison(),
        poison_of_prefix(),
        poison_of_decode(),
        mild_adapter(),
        max_num_seqs=3,
        max_prefill_tokens=8,
        forward=forward,
    )
    neighbour = submit(engine, "neighbour", LONG, greedy(30), mild_adapter())
    step_until(engine, lambda: len(neighbour.tokens) >= 1)
    way(engine)
    assert neighbour.finish_reason is None, "it must still decode beside what follows"
    after = [submit(engine, f"after{i}", SHORT) for i in range(2)]
    finish(engine, neighbour, *after)
    assert_idle(engine)
    return neighbour, after


@pytest.mark.parametrize("forward", get_args(Forward))
@pytest.mark.parametrize("way", POISONINGS)
def test_a_poisonous_adapter_hurts_neither_neighbours_nor_successors(
    way: Callable[[EmbeddedEngine], None], forward: str
) -> None:
    """NaN left in a slot reaches the next request there: attention weighs it 0, and 0·NaN is NaN.

    The neighbour's context is longer than the successors', so their rows attend, masked, over
    what the poisoned request left behind.
    """
    neighbour, after = run_after_poison(way, forward)
    assert neighbour.token_ids == expected(LONG, greedy(30), mild_adapter())
    for successor in after:
        assert successor.error is None, successor.error
        assert successor.token_ids == expected(SHORT)


@pytest.mark.parametrize(
    "way", [poison_fails, poison_comes_with_its_prefix, poison_comes_in_decode]
)
def test_without_clearing_the_poison_would_spread(
    monkeypatch: pytest.MonkeyPatch, way: Callable[[EmbeddedEngine], None]
) -> None:
    """The control of the test above: it can fail, where attention reads what it then masks."""
    monkeypatch.setattr(SlotKV, "clear", lambda self, *_: None)
    neighbour, after = run_after_poison(way, "torch")
    assert neighbour.token_ids == expected(LONG, greedy(30), mild_adapter())
    assert any(successor.token_ids != expected(SHORT) for successor in after)


def test_a_prefill_that_raises_fails_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The packed forward is tried again, a request at a time."""
    prefill = ModelRunner.prefill

    def fragile(self: ModelRunner, chunks: Sequence[Chunk]) -> torch.Tensor:
        if any(chunk.sequence.request.request_id == "bad" for chunk in chunks):
            raise RuntimeError("kernel launch failed")
        return prefill(self, chunks)

    monkeypatch.setattr(ModelRunner, "prefill", fragile)
    engine = make_engine(mild_adapter())
    prompts = {name: random_prompt(5 + i, i) for i, name in enumerate(["a", "bad", "c", "d"])}
    adapters = {"a": mild_adapter(), "d": mild_adapter()}
    recorders = {
        name: submit(engine, name, prompt, GREEDY, adapters.get(name))
        for name, prompt in prompts.items()
    }
    finish(engine, *recorders.values())
    bad = recorders.pop("bad")
    assert isinstance(bad.error, RequestFailed)
    assert "kernel launch failed" in str(bad.error)
    assert len(bad.outputs) == 1
    for name, recorder in recorders.items():
        assert recorder.token_ids == expected(prompts[name], GREEDY, adapters.get(name))
    stats = engine.stats()
    assert stats.prompt_tokens_total == sum(len(p) for n, p in prompts.items() if n != "bad")
    assert_idle(engine)


def test_a_decode_that_raises_ends_the_guilty_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is taken apart; neighbours, and one that is still prefilled, are answered."""
    engine = make_engine(max_prefill_tokens=8)
    decoding = {name: submit(engine, name, random_prompt(4, i)) for i, name in enumerate("abc")}
    engine.step()
    engine.step()
    prefilling = submit(engine, "prefilling", LONG)
    real = ModelRunner.decode

    def decode(
        self: ModelRunner, running: Sequence[EngineSequence], only: EngineSequence | None = None
    ) -> torch.Tensor:
        if "b" in [s.request.request_id for s in ([only] if only else running)]:
            raise RuntimeError("out of memory")
        return real(self, running, only)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "decode", decode)
        finish(engine, *decoding.values(), prefilling)
    bad = decoding.pop("b")
    assert isinstance(bad.error, RequestFailed)
    assert "out of memory" in str(bad.error)
    assert prefilling.token_ids == expected(LONG)
    for name, recorder in decoding.items():
        assert recorder.token_ids == expected(random_prompt(4, "abc".index(name)))
    assert_idle(engine)


# Deadlines --------------------------------------------------------------------------------


def test_a_deadline_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting or running; those without one, and those that ended in time, are untouched."""
    engine = make_engine(max_num_seqs=2)
    recorders = {name: Recorder() for name in ("done", "running", "free", "waiting")}
    for name, seconds in (("done", 5.0), ("running", 10.0), ("free", None), ("waiting", 10.0)):
        request = Request(name, SHORT, greedy(1 if name == "done" else 9), deadline_s=seconds)
        engine.submit(request, recorders[name])
    for _ in range(3):
        engine.step()
    later = time.monotonic() + 11
    monkeypatch.setattr(time, "monotonic", lambda: later)
    engine.submit(Request("done", SHORT, greedy(2)), again := Recorder())  # its id came back
    finish(engine, again, *recorders.values())
    assert {name: recorder.finish_reason for name, recorder in recorders.items()} == {
        "done": "length",
        "running": "error",
        "free": "length",
        "waiting": "error",
    }
    for name in ("running", "waiting"):
        assert isinstance(recorders[name].error, DeadlineExceeded)
        assert "deadline of 10.0 s" in str(recorders[name].error)
    assert recorders["free"].token_ids == expected(SHORT, greedy(9))
    assert again.finish_reason == "length"
    assert_idle(engine)


def test_a_request_that_has_ended_keeps_nothing_alive() -> None:
    """Its adapter may be unloaded next, and its deadline be minutes away."""
    adapter = random_adapter(tiny_description())
    engine = make_engine(adapter)
    recorder = Recorder()
    choice = AdapterChoice(adapter.digest)
    engine.submit(Request("r", SHORT, greedy(2), (choice,), deadline_s=600.0), recorder)
    finish(engine, recorder)
    resident = weakref.ref(engine._adapters[adapter.digest])
    engine.unload_adapter(adapter.digest)
    gc.collect()
    assert resident() is None
