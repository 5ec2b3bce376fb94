from __future__ import annotations

import threading

import pytest

from reft_core.threads import run_in_own_thread, start_in_own_thread


def test_the_result_comes_from_a_thread_that_has_ended() -> None:
    thread = run_in_own_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_an_error_arrives_as_it_was_raised() -> None:
    error = ValueError("the very one")

    def fail() -> None:
        raise error

    with pytest.raises(ValueError, match="the very one") as caught:
        run_in_own_thread(fail)
    assert caught.value is error


def test_a_result_can_be_waited_for_and_not_be_cancelled() -> None:
    gate = threading.Event()
    coming = start_in_own_thread(lambda: gate.wait(10))
    assert not coming.done()
    assert not coming.cancel()
    gate.set()
    assert coming.result(10) is True
    with pytest.raises(ZeroDivisionError):
        start_in_own_thread(lambda: 1 // 0).result(10)
