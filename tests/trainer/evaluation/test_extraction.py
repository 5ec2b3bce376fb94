from __future__ import annotations

import pytest

from trainer.evaluation.scoring.extraction import (
    after_trigger,
    first_letter,
    last_number,
    leading_choice,
    mentioned_choice,
    sql_query,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the correct answer is answer2", "answer2"),
        ("Well, the correct answer is  true \n", "true"),
        ("true", ""),
        (
            "the correct answer is false. the correct answer is true",
            "false. the correct answer is true",
        ),
    ],
)
def test_commonsense_takes_all_that_follows_the_first_trigger(text: str, expected: str) -> None:
    assert after_trigger(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 apples and 1,234 pears", "1234"),
        ("The answer is 18.", "18."),
        ("it fell by -3.50 degrees", "-3.50"),
        ("none at all", ""),
    ],
)
def test_arithmetic_takes_the_last_number(text: str, expected: str) -> None:
    assert last_number(text) == expected


def test_letters_are_the_first_capital_up_to_e() -> None:
    assert first_letter("the answer is (C), not B") == "C"
    assert first_letter("A train leaves: C") == "A"
    assert first_letter("f, g") == ""


CHOICES = ("card", "card_lost", "no", "not sure")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Card_Lost.", "card_lost"),
        ("card\nand more", "card"),
        ("cards", ""),
        ("not sure at all", "not sure"),
        ("nothing", ""),
        ("my card", ""),
        ("", ""),
    ],
)
def test_a_leading_choice_is_the_longest_that_the_text_begins_with(
    text: str, expected: str
) -> None:
    assert leading_choice(text, CHOICES) == expected


def test_a_mentioned_choice_is_the_first_in_the_text() -> None:
    assert mentioned_choice("I am not sure, no.", CHOICES) == "not sure"
    assert mentioned_choice("nope, a card_lost? (card)", CHOICES) == "card_lost"
    assert mentioned_choice("nothing", CHOICES) == ""


def test_a_query_is_the_first_statement_out_of_its_fence() -> None:
    assert sql_query("SELECT 1 ; DROP TABLE x") == "SELECT 1"
    assert sql_query("Here:\n```sql\nSELECT a\nFROM b;\n```\nbye") == "SELECT a\nFROM b"
