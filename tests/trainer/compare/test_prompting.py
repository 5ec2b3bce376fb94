from __future__ import annotations

from pathlib import Path

import pytest

from reft_core.errors import TrainingError
from reft_core.spec import TemplateSpec
from tests.trainer.compare.factories import tiny_task
from trainer.compare import serving
from trainer.compare.prompting import draw_shots, with_shots


def decoded(task, row) -> str:  # type: ignore[no-untyped-def]
    return task.loaded.tokenizer.decode(row.prompt)


def test_shots_are_earlier_turns_of_a_chat(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    shown = with_shots(task, task.valid, 2, seed=0)
    text = decoded(task, shown.rows[0])
    drawn = draw_shots(task.train.dataset, 2, 0, labelled=True)
    turns = "".join(f"<user>{d.question}<end><assistant>{d.completion}<end>" for d in drawn)
    assert text == turns + decoded(task, task.valid.rows[0])
    assert shown.rows[0].completion == task.valid.rows[0].completion


def test_shots_in_a_template_are_prompts_and_their_answers(tmp_path: Path) -> None:
    template = TemplateSpec(user="Q: {content}\n", generation="A: ")
    task = tiny_task(tmp_path, template=template)
    text = decoded(task, with_shots(task, task.valid, 2, seed=3).rows[1])
    first, second = draw_shots(task.train.dataset, 2, 3, labelled=True)
    assert text == (
        f"Q: {first.question}\nA: {first.completion}\n\n"
        f"Q: {second.question}\nA: {second.completion}\n\nQ: no 41 b\nA: "
    )


def test_every_label_is_shown_as_often(tmp_path: Path) -> None:
    dataset = tiny_task(tmp_path).train.dataset
    answers = [example.completion for example in draw_shots(dataset, 6, 1, labelled=True)]
    assert sorted(answers) == ["n"] * 3 + ["y"] * 3
    again = draw_shots(dataset, 6, 1, labelled=True)
    assert [e.completion for e in again] == answers
    assert draw_shots(dataset, 6, 2, labelled=True) != again


def test_more_shots_than_fit_are_refused(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    with pytest.raises(TrainingError, match=r"shots: got 20, expected fewer: .*exceeds 128 tokens"):
        with_shots(task, task.valid, 20, seed=0)
    with pytest.raises(TrainingError, match="shots: got 99, expected at most 40"):
        with_shots(task, task.valid, 99, seed=0)


def test_costs_are_counted_from_the_requests(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    work = serving.Workload.of(task.loaded.description, task.valid.rows)
    assert serving.none().extra_percent == 0
    double = serving.longer_prompt(work, work.prompt).extra_percent
    assert 60 < double < 130, "nearly all work is in the prompt, and attention grows faster"
    assert serving.longer_prompt(work, 2 * work.prompt).extra_percent > 2 * double
    assert serving.head(work, 64).extra_percent < 0, "no answer is generated"
    assert serving.own_weights().scope == "own weights"
