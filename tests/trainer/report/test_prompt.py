from __future__ import annotations

from reft_core.positions import PositionRule
from tests.trainer.factories import byte_tokenizer
from trainer.report.prompt import MOST_SHOWN, drawn_prompt


def test_a_prompts_tokens_know_their_units() -> None:
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
