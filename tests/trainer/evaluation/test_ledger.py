from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from reft_core.spec import TemplateSpec
from trainer.evaluation.asking import Contender, Ledger, Question, Reply, Wanted
from trainer.evaluation.rows import Row

BASE = Contender("base", "base")
ROWS = [
    Row(str(n), f"f:{n}", (("user", f"q{n}"),), ("a",), candidates=("a", "b")) for n in range(4)
]


class Counting:
    """Answers with the question; counts; breaks off after ``stop_after`` replies."""

    def __init__(self, stop_after: int = 99) -> None:
        self.asked: list[str] = []
        self._stop_after = stop_after

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        for place, question in enumerate(questions):
            if place == self._stop_after:
                raise KeyboardInterrupt
            self.asked.append(question.row.question)
            yield place, Reply(f"to {question.row.question}", "stop", (-1.0, -2.0), 1.5, 2)


def questions(rows: Sequence[Row] = ROWS) -> list[Question]:
    return [Question(BASE, row, Wanted()) for row in rows]


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "out" / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        list(Ledger(path).ask(Counting(stop_after=2), questions()))
    with path.open("a") as file:
        file.write('{"key": "cut of')  # as a crash leaves it
    asker = Counting()
    found = dict(Ledger(path).ask(asker, questions()))
    assert asker.asked == ["q2", "q3"]
    assert [found[place].text for place in range(4)] == [f"to q{n}" for n in range(4)]
    assert found[0] == found[3].__class__("to q0", "stop", (-1.0, -2.0), 1.5, 2)
    third = Counting()
    assert dict(Ledger(path).ask(third, questions())) == found
    assert third.asked == []


def test_equal_questions_are_asked_once() -> None:
    asker = Counting()
    found = dict(Ledger(None).ask(asker, questions([ROWS[0], ROWS[1], ROWS[0]])))
    assert asker.asked == ["q0", "q1"]
    assert found[0] == found[2]


def test_a_key_tells_apart_all_that_changes_a_reply() -> None:
    base = Question(BASE, ROWS[0], Wanted(text=True, choice=True, loss=True, max_tokens=8))
    row, wanted = base.row, base.wanted
    others = [
        replace(base, contender=replace(BASE, identity="other")),
        replace(base, contender=replace(BASE, strength=0.5)),
        replace(base, contender=replace(BASE, template=TemplateSpec(user="Q: {content}"))),
        replace(base, row=replace(row, turns=(("user", "else"),))),
        replace(base, row=replace(row, candidates=("a", "c"))),
        replace(base, row=replace(row, references=("b",))),
        replace(base, wanted=replace(wanted, max_tokens=9)),
        replace(base, wanted=replace(wanted, loss=False)),
    ]
    assert len({base.key, *(other.key for other in others)}) == len(others) + 1
    renamed = replace(
        base, contender=replace(BASE, name="new"), row=replace(row, id="9", where="g")
    )
    assert renamed.key == base.key
