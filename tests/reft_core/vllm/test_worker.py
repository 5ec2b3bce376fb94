"""What failed in a step reaches vLLM's scheduler, however the step's output gets there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from reft_core.vllm.worker import Armed


@pytest.fixture
def armed() -> Armed:
    """Without a model, after a step in which two requests failed."""
    found = Armed.__new__(Armed)
    found.failed = {"b", "a"}
    return found


def test_an_output_names_what_failed_once(armed: Armed) -> None:
    first, second = SimpleNamespace(), SimpleNamespace()
    armed.name_failures(first)
    armed.name_failures(second)
    assert first.reft_failed == ["a", "b"]
    assert not hasattr(second, "reft_failed")


def test_an_output_that_is_still_on_its_way_does_too(armed: Armed) -> None:
    inner = SimpleNamespace()
    output = SimpleNamespace(get_output=lambda: inner)
    armed.name_failures(output)
    assert not hasattr(inner, "reft_failed")
    assert output.get_output().reft_failed == ["a", "b"]
