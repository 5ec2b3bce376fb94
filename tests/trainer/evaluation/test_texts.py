from __future__ import annotations

import pytest

from trainer.evaluation.scoring import METRICS, OTHER, confusion, score
from trainer.evaluation.scoring.texts import emoji_only, exact_match, valid_json


def test_exact_match_forgives_white_space_around_an_answer_alone() -> None:
    assert exact_match(" yes\n", "yes")
    assert not exact_match("Yes", "yes")
    assert not exact_match("yes.", "yes")


REFERENCE = '{"answer": "Au", "topic": "science"}'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (REFERENCE, True),
        ('{"topic": "art", "answer": "Klimt"}', True),
        (' {"answer": "x", "topic": "y"}\n', True),
        ('{"answer": "x"}', False),
        ('{"answer": "x", "topic": "y", "more": "z"}', False),
        ('{"answer": "x", "topic": 3}', False),
        ('{"answer": "x",\n "topic": "y"}', False),
        ('{"answer": "x", "topic": "y"', False),
        ('Sure: {"answer": "x", "topic": "y"}', False),
        ('["answer", "topic"]', False),
        ("", False),
        ("[" * 100_000, False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_valid_json_wants_the_references_keys_on_one_line(answer: str, expected: bool) -> None:
    assert valid_json(answer, REFERENCE) is expected


@pytest.mark.parametrize("answer", ["🎂🎁🎉", "❤️", "👩🏽‍🚀", "🇨🇭", "1️⃣", "☕ 💻", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "⭐", "✅"])
def test_emoji_pass(answer: str) -> None:
    assert emoji_only(answer, "")


@pytest.mark.parametrize(
    "answer", ["", " ", "1", "ok 👍", "👍!", "\ufffd", "🎂\ufffd", "°", "\u200d"]
)
def test_anything_else_fails(answer: str) -> None:
    assert not emoji_only(answer, "")


def test_score_is_the_share_that_passes() -> None:
    assert score("exact_match", ["a", "b", "c", "c"], ["a", "b", "x", "y"]) == 0.5
    assert {"exact_match", "valid_json", "emoji_only"} < set(METRICS)


def test_confusion_counts_answers_by_reference() -> None:
    matrix = confusion(["a", "b", "c"], [" a", "b", "what?", "b"], ["a", "a", "b", "b"])
    assert matrix.counts["a"] == {"a": 1, "b": 1, "c": 0, OTHER: 0}
    assert matrix.counts["b"] == {"a": 0, "b": 1, "c": 0, OTHER: 1}
