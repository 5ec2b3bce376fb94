"""An engine that is not started, stepped by the test itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from reft_core.engine.engine import EmbeddedEngine
from tests.factories import Recorder


def step_until(engine: EmbeddedEngine, done: Callable[[], bool]) -> None:
    """Step until ``done`` says so; fail after 500 steps."""
    for _ in range(500):
        if done():
            return
        engine.step()
    pytest.fail("still not done after 500 steps")


def finish(engine: EmbeddedEngine, *recorders: Recorder) -> None:
    """Step until these requests have ended."""
    step_until(engine, lambda: all(recorder.finish_reason for recorder in recorders))
