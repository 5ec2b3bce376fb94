from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.factories import byte_tokenizer
from trainer.curve import MOST_POINTS, Curve
from trainer.evaluation.splits import Evaluation, Sample
from trainer.report.document import _samples, shown_path
from trainer.report.prompt import MOST_SHOWN, drawn_prompt


def test_paths_are_told_from_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "out" / "a.safetensors") == "out/a.safetensors"
    assert shown_path(Path("/elsewhere/a.safetensors")) == "/elsewhere/a.safetensors"


def test_answers_are_judged_row_by_row_where_a_metric_can() -> None:
    samples = (Sample("a", "y", "I am", " y"), Sample("b", "n", "n", "y"))
    judged = _samples(Evaluation({}, None, samples), "exact_match")
    assert [(row["base_score"], row["adapter_score"]) for row in judged] == [(0, 1), (1, 0)]
    of_sets = _samples(Evaluation({}, None, samples), "pearson")
    assert {row["adapter_score"] for row in of_sets} == {None}


def test_a_prompts_tokens_know_their_units() -> None:
    from reft_core.positions import PositionRule

    tokenizer = byte_tokenizer()
    tokens = tokenizer("ab c\u00e9", add_special_tokens=False)["input_ids"]
    drawn = drawn_prompt(tokens, tokenizer, PositionRule.parse("f1+l2", tied=False))
    assert drawn["units"] == [1, 2]
    assert [(t["text"], t["unit"]) for t in drawn["tokens"]] == [
        ("a", 0), ("b", None), (" ", None), ("c", None), (r"bytes:\xc3", 1), (r"bytes:\xa9", 1),
    ]  # fmt: skip
    assert drawn_prompt(tokens, tokenizer, None)["units"] == []


def test_the_middle_of_a_long_prompt_is_left_out() -> None:
    drawn = drawn_prompt([5] * 1000, byte_tokenizer(), None)
    places = [token["position"] for token in drawn["tokens"]]
    assert len(places) == MOST_SHOWN
    assert (places[0], places[199], places[200], places[-1]) == (0, 199, 800, 999)
    assert drawn["num_tokens"] == 1000


def test_a_curve_has_each_step_until_there_are_many() -> None:
    curve = Curve()
    curve.extend([4.0, 2.0])
    assert curve.steps() == ((1, 4.0), (2, 2.0))
    curve.extend(float(step) for step in range(3, 2 * MOST_POINTS + 2))
    again = Curve(**curve.state())
    for each in (curve, again):
        each.extend([7.0])
        steps = each.steps()
        assert len(steps) <= MOST_POINTS
        assert steps[0] == (4, (4 + 2 + 3 + 4) / 4)
        assert steps[-1][0] == 2 * MOST_POINTS + 2
    assert again.steps() == curve.steps()
