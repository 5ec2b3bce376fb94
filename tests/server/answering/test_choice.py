from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reft_core.engine.interface import Token, TokenLogprob
from reft_core.vocabulary import Vocabulary
from server.answering.choice import ChoiceText
from tests.server.fakes import make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)


def tokens_of(text: str) -> list[Token]:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return [Token(i, -1.0, (TokenLogprob(i, -1.0),)) for i in ids]


def run(text: str, stops: tuple[str, ...] = (), *, hidden_last: bool = False):
    choice = ChoiceText(VOCABULARY, stops, with_tokens=True)
    shown, described = "", []
    tokens = tokens_of(text)
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1
        piece = choice.push(token, is_last=last, hidden=last and hidden_last)
        shown += piece.text
        described += piece.tokens
        if choice.stopped:
            break
    return choice, shown, described


@given(st.text(min_size=1, max_size=30))
def test_tokens_come_in_step_with_their_text(text):
    choice, shown, described = run(text)
    assert shown == text
    assert b"".join(token.data for token in described) == text.encode()
    assert choice.num_tokens == len(described) == len(tokens_of(text))
    offsets = [token.text_offset for token in described]
    assert offsets == sorted(offsets)
    for token in described:
        if not token.text.startswith("bytes:"):
            assert text[token.text_offset :].startswith(token.text)


def test_an_impossible_token_has_a_finite_logprob():
    choice = ChoiceText(VOCABULARY, with_tokens=True)
    (described,) = choice.push(Token(5, float("-inf"), (TokenLogprob(6, float("-inf")),))).tokens
    assert (described.logprob, described.top[0].logprob) == (-9999.0, -9999.0)


def test_tokens_of_a_stop_string_are_not_shown():
    choice, shown, described = run("one two", stops=("e t",))
    assert (shown, choice.stopped) == ("on", True)
    assert [token.text for token in described] == ["o", "n"]
    assert choice.num_tokens == 5


def test_a_stop_string_may_begin_inside_a_token():
    choice, shown, described = run("xhe!", stops=("e!",))
    assert (shown, choice.stopped) == ("xh", True)
    assert [token.text for token in described] == ["x", "he"]


def test_a_hidden_last_token_counts_without_text():
    choice, shown, described = run("abc", hidden_last=True)
    assert (shown, choice.num_tokens, len(described)) == ("ab", 3, 2)


def test_held_text_is_flushed_with_the_last_token():
    choice, shown, _ = run("say hel", stops=("hello",))
    assert (shown, choice.stopped) == ("say hel", False)


def test_a_stop_string_can_be_completed_by_the_flush():
    # The last token leaves half a character, whose replacement completes the stop string.
    ids = TOKENIZER("a😀", add_special_tokens=False)["input_ids"][:3]
    choice = ChoiceText(VOCABULARY, ("a\ufffd",))
    shown = "".join(
        choice.push(Token(i), is_last=n == len(ids) - 1).text for n, i in enumerate(ids)
    )
    assert (shown, choice.stopped) == ("", True)
