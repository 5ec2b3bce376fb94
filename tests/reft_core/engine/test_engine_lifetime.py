"""Starting, draining, stopping and dying; and many callers at once."""

from __future__ import annotations

import threading

import pytest

from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Output, Request
from reft_core.errors import (
    EngineUnavailable,
    InvalidRequest,
    RequestFailed,
)
from tests.factories import (
    Recorder,
)
from tests.reft_core.engine.engines import (
    GREEDY,
    LONG,
    SHORT,
    WAIT_S,
    expected,
    greedy,
    make_engine,
    mild_adapter,
    poison,
    started,
    submit,
)


def test_requests_wait_for_the_start() -> None:
    engine = make_engine()
    done = threading.Event()
    recorder = Recorder()

    def sink(output: Output) -> None:
        recorder(output)
        if output.finish_reason:
            done.set()

    engine.submit(Request("r", SHORT, GREEDY), sink)
    with started(engine):
        assert done.wait(WAIT_S)
    assert recorder.token_ids == expected(SHORT)


def test_draining_refuses_new_requests_and_finishes_the_old() -> None:
    engine = make_engine()
    recorder = submit(engine, "r", SHORT)
    assert engine.drain(timeout_s=0) is False, "it is still open"
    with pytest.raises(EngineUnavailable, match="shutting down"):
        submit(engine, "late", SHORT)
    assert engine.healthy
    with started(engine):
        assert engine.drain(WAIT_S) is True
        assert recorder.token_ids == expected(SHORT)
        with pytest.raises(EngineUnavailable):
            submit(engine, "late", SHORT)


def test_draining_an_idle_engine_takes_no_time() -> None:
    assert make_engine().drain(timeout_s=0) is True


def test_stopping_ends_every_open_request() -> None:
    """One that runs and one that waits; both learn why."""
    engine = make_engine(max_num_seqs=1, max_model_len=256)
    first_token = threading.Event()
    running = Recorder()

    def sink(output: Output) -> None:
        running(output)
        first_token.set()

    engine.submit(Request("running", SHORT, greedy(250)), sink)
    waiting = submit(engine, "waiting", SHORT)
    engine.start()
    assert first_token.wait(WAIT_S)
    engine.stop()
    for recorder in (running, waiting):
        last = recorder.outputs[-1]
        assert last.finish_reason == "error"
        assert isinstance(last.error, EngineUnavailable)
        assert "stopped" in str(last.error)
        assert sum(output.finish_reason is not None for output in recorder.outputs) == 1
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        submit(engine, "late", SHORT)
    assert engine.drain(timeout_s=0) is True, "nothing is open"
    engine.stop()
    assert waiting.tokens == []


def test_stopping_an_engine_that_never_started() -> None:
    engine = make_engine()
    recorder = submit(engine, "r", SHORT)
    engine.stop()
    assert isinstance(recorder.error, EngineUnavailable)


# The engine's thread raises on, which is how its death reaches the process's log.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_request_accepted_while_the_engine_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    first = submit(engine, "first", SHORT)
    stepping, dying = threading.Event(), threading.Event()

    def dying_step() -> None:
        stepping.set()
        assert dying.wait(WAIT_S)
        raise MemoryError("out of memory")

    monkeypatch.setattr(engine, "step", dying_step)
    engine.start()
    assert stepping.wait(WAIT_S)
    with engine.together():  # the lock under which a request is accepted
        dying.set()
        late = submit(engine, "late", SHORT)
    assert engine._thread is not None
    engine._thread.join(WAIT_S)
    assert [type(recorder.error) for recorder in (first, late)] == [EngineUnavailable] * 2
    assert engine.drain(WAIT_S)


# The engine's thread raises on, which is how its death reaches the process's log.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_says_so_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_num_seqs=1)
    recorders = [submit(engine, f"r{i}", SHORT, greedy(50)) for i in range(3)]
    steps = 0

    def dying_step() -> None:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise MemoryError("out of memory")
        EmbeddedEngine.step(engine)

    monkeypatch.setattr(engine, "step", dying_step)
    assert engine.healthy
    engine.start()
    assert engine._thread is not None
    engine._thread.join(WAIT_S)
    assert not engine._thread.is_alive()
    assert not engine.healthy
    for recorder in recorders:
        assert isinstance(recorder.error, EngineUnavailable)
        assert "out of memory" in str(recorder.error)
    assert recorders[0].token_ids == expected(SHORT, greedy(50))[: len(recorders[0].tokens)]
    assert recorders[0].tokens, "it ran before the engine died"
    with pytest.raises(EngineUnavailable):
        submit(engine, "late", SHORT)
    engine.cancel("r0")
    engine.stop()
    assert [len(r.outputs) - len(r.tokens) for r in recorders] == [1, 1, 1]


def test_many_threads_submit_and_cancel_at_once() -> None:
    """Every request ends exactly once, whatever its neighbours do."""
    engine = make_engine(mild_adapter(), max_num_seqs=3, max_prefill_tokens=8)
    answers = {True: expected(SHORT, GREEDY, mild_adapter()), False: expected(SHORT)}
    recorders: dict[str, Recorder] = {}
    with started(engine):

        def client(number: int) -> None:
            for i in range(6):
                name = f"{number}-{i}"
                adapter = mild_adapter() if i % 2 else None
                recorders[name] = submit(engine, name, SHORT, GREEDY, adapter)
                if i % 3 == 2:
                    engine.cancel(name)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert engine.drain(WAIT_S)
    assert len(recorders) == 30
    for name, recorder in recorders.items():
        i = int(name[-1])
        assert sum(output.finish_reason is not None for output in recorder.outputs) == 1
        if i % 3 == 2:
            assert recorder.finish_reason in ("cancelled", "length")
            assert recorder.token_ids == answers[bool(i % 2)][: len(recorder.tokens)]
        else:
            assert recorder.token_ids == answers[bool(i % 2)], name
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 0)


# generate() -------------------------------------------------------------------------------


def test_generate_keeps_order_and_waits_when_the_queue_is_full() -> None:
    engine = make_engine(mild_adapter(), max_num_seqs=2, max_waiting=1)
    choices = (AdapterChoice(mild_adapter().digest),)
    requests = [Request(f"r{i}", LONG[: 4 + i], greedy(3 + i % 3), choices) for i in range(8)]
    with started(engine):
        completions = generate(engine, requests)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.token_ids == expected(request.prompt, request.params, mild_adapter())
        assert completion.finish_reason == "length"
        assert completion.num_edits == 3 * 4 + 1
        assert completion.timings is not None


def test_generate_raises_a_requests_error_and_cancels_the_rest() -> None:
    engine = make_engine(poison())
    requests = [Request(f"r{i}", LONG, greedy(30)) for i in range(3)]
    requests.insert(1, Request("bad", LONG, GREEDY, (AdapterChoice(poison().digest),)))
    with started(engine):
        with pytest.raises(RequestFailed, match="not finite"):
            generate(engine, requests)
        with pytest.raises(InvalidRequest, match="at least one token"):
            generate(engine, [Request("a", SHORT, greedy(30)), Request("b", ())])
        assert engine.drain(WAIT_S)
    assert engine.stats().num_running == 0
