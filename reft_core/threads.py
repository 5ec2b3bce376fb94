"""Keeps the engine's thread the only one that holds an OpenMP pool.

For heavy torch work outside of the engine's thread, such as loading a model. libgomp keeps a
pool of workers for every thread that ever ran a parallel region, for as long as that thread
lives, and once all pools together have more threads than there are cores it stops spinning
between regions. Every small product of a decode step then waits for a wake-up, and on few cores
a step takes about half as long again. A thread that ends takes its pool along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_stack_size = threading.Lock()


def run_in_own_thread(function: Callable[[], T], *, stack_bytes: int = 0) -> T:
    """What ``function`` returns or raises, run in a thread that has ended by then.

    ``stack_bytes`` gives the thread that much stack, for deep recursion in foreign code; 0 is
    the platform's own size. Only what is used of it takes memory.
    """
    thread, future = _start(function, stack_bytes)
    thread.join()
    return future.result()


def start_in_own_thread(function: Callable[[], T]) -> Future[T]:
    """What ``function`` will return or raise, run in a thread that ends with it.

    It cannot be cancelled: a waiter that leaves only stops waiting.
    """
    return _start(function)[1]


def _start(function: Callable[[], T], stack_bytes: int = 0) -> tuple[threading.Thread, Future[T]]:
    """A thread that has started, and the outcome of its function."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    thread = threading.Thread(target=run, name="reft-once")
    with _stack_size:  # the setting is the process's, so a thread started just now may share it
        before = threading.stack_size(stack_bytes)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread, future
