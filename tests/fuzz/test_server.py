"""A short attack on a real server; ``make fuzz`` is the long one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.fuzz import contract, wire
from benchmarks.fuzz.serving import Target, serving


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with serving(tmp_path_factory.mktemp("attacked")) as running:
        yield running


# Schemathesis closes no connection of a session it has done with.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_every_answer_is_as_the_document_says(target: Target) -> None:
    report = contract.attack(target, seed=1, max_examples=25)
    assert report.problems == []
    assert report.server_errors == 0
    assert report.cases > 1000
    for operation in ("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/classify"):
        assert report.statuses[f"{operation} 200"] > 10, "or nothing but refusals was tested"
        assert report.statuses[f"{operation} 400"] > 10
    assert target.leftovers() == []
    assert target.is_alive()


def test_no_bytes_make_it_fail(target: Target) -> None:
    report = wire.attack(target, seed=1, num_random=200)
    assert report.problems == []
    assert report.server_errors == 0
    assert report.cases > 1000
    assert target.leftovers() == []
    assert target.is_alive()
