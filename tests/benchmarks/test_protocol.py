from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.peers import protocol
from benchmarks.peers.protocol import OWN_PYTHON, PeerMissing, Worker


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LOGS", tmp_path)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(OWN_PYTHON, "tests.benchmarks.echo_worker", "echo", {}) as started:
        yield started


def test_answers_survive_what_libraries_print(worker: Worker) -> None:
    answer = worker.ask("run", 30, prompts=[[1], [2]], output_tokens=3, settings={})
    assert answer["tokens"] == [[0, 1, 2], [0, 1, 2]]
    assert "a library that prints" in worker.log.read_text()


def test_an_error_is_reported_and_the_worker_lives_on(worker: Worker) -> None:
    with pytest.raises(PeerMissing, match="ValueError: no such model"):
        worker.ask("fail", 30, text="no such model")
    assert worker.ask("run", 30, prompts=[], output_tokens=1, settings={})["ok"]


def test_a_worker_that_ends_is_missed_with_its_last_words(worker: Worker) -> None:
    with pytest.raises(PeerMissing, match="out of memory"):
        worker.ask("leave", 30)


def test_no_answer_in_time(worker: Worker) -> None:
    worker.ask("run", 30, prompts=[], output_tokens=1, settings={})
    with pytest.raises(PeerMissing, match="no answer within"):
        worker.ask("run", 0.05, prompts=[], output_tokens=1, settings={"sleep_s": 1})


def test_a_module_that_is_not_there() -> None:
    with (
        Worker(OWN_PYTHON, "benchmarks.peers.nobody", "nobody", {}) as gone,
        pytest.raises(PeerMissing, match="nobody"),
    ):
        gone.ask("run", 30, prompts=[])
