from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from reft_core.vocabulary import Vocabulary
from server.answering.text import Detokenizer, StopMatcher
from tests.server.fakes import make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
BYTE_IDS = [TOKENIZER.convert_tokens_to_ids(c) for c in sorted(VOCABULARY._tokenizer.vocab)]


def pieces(token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(VOCABULARY.decode, VOCABULARY.special_ids)
    return [*(detokenizer.push(i) for i in token_ids), detokenizer.finish()]


@given(st.text(max_size=60))
def test_pieces_of_any_text_join_to_it_and_never_split_a_character(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assume(not VOCABULARY.special_ids & set(ids))  # those have no text
    found = pieces(ids)
    assert "".join(found) == VOCABULARY.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=120))
def test_pieces_of_any_tokens_join_to_their_text(ids):
    assert "".join(pieces(ids)) == VOCABULARY.decode(ids)


@pytest.mark.parametrize("byte", [0xE2, 0x82, 0xFF, 0xF0])
def test_endless_garbage_is_given_out_and_stays_exact(byte):
    letter = next(
        c
        for c in VOCABULARY._tokenizer.vocab
        if VOCABULARY.describe(TOKENIZER.convert_tokens_to_ids(c))[1] == bytes([byte])
    )
    ids = [TOKENIZER.convert_tokens_to_ids(letter)] * 500
    ids += TOKENIZER("€uro", add_special_tokens=False)["input_ids"]
    found = pieces(ids)
    assert "".join(found) == VOCABULARY.decode(ids)
    longest = max(map(len, found))
    assert longest < 64, f"held back {longest} characters"


def test_a_character_of_four_bytes_comes_with_its_last():
    ids = TOKENIZER("a😀b", add_special_tokens=False)["input_ids"]
    assert pieces(ids) == ["a", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_is_flushed():
    ids = TOKENIZER("😀", add_special_tokens=False)["input_ids"]
    assert pieces(ids[:3]) == ["", "", "", "\ufffd"]


def test_special_tokens_have_no_text():
    ids = TOKENIZER("a<|im_end|>b<|im_start|>")["input_ids"]
    assert pieces(ids) == ["a", "", "b", "", ""]


@pytest.fixture(scope="module")
def sentencepiece_like() -> Vocabulary:
    words = ["▁Hello", "▁wor", "ld", "▁", "!", "<unk>"] + [f"<0x{b:02X}>" for b in range(256)]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@given(st.lists(st.integers(0, 4), max_size=20))
def test_leading_spaces_survive_in_a_sentencepiece_vocabulary(sentencepiece_like, ids):
    detokenizer = Detokenizer(sentencepiece_like.decode)
    found = [*(detokenizer.push(i) for i in ids), detokenizer.finish()]
    assert "".join(found) == sentencepiece_like.decode(ids)


def test_byte_fallback_characters_are_held_until_whole(sentencepiece_like):
    ids = [0, *(6 + byte for byte in "é€".encode()), 4]
    detokenizer = Detokenizer(sentencepiece_like.decode)
    found = [*(detokenizer.push(i) for i in ids), detokenizer.finish()]
    assert "".join(found) == "Helloé€!"
    assert not any("\ufffd" in piece for piece in found)


def test_tokens_are_described_by_text_and_bytes(sentencepiece_like):
    euro = TOKENIZER("€", add_special_tokens=False)["input_ids"]
    described = [VOCABULARY.describe(i) for i in euro]
    assert b"".join(data for _, data in described) == "€".encode()
    assert described[0][0] == "bytes:\\xe2"
    assert VOCABULARY.describe(TOKENIZER.convert_tokens_to_ids("he")) == ("he", b"he")
    assert VOCABULARY.describe(TOKENIZER.eos_token_id) == ("<|im_end|>", b"<|im_end|>")
    assert sentencepiece_like.describe(0) == (" Hello", b" Hello")
    assert sentencepiece_like.describe(6 + 0xE2) == ("bytes:\\xe2", b"\xe2")
    assert sentencepiece_like.describe(6 + 0x41) == ("A", b"A")


# Stop strings -------------------------------------------------------------------------------

alphabet = st.text(alphabet="ab.", max_size=30)
stop_strings = st.lists(st.text(alphabet="ab.", min_size=1, max_size=4), max_size=4)


def cut_at_first_complete(text: str, stops: list[str]) -> str:
    """Slow truth: read on character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(alphabet, stop_strings, st.lists(st.integers(0, 30), max_size=10))
def test_text_is_cut_at_the_first_complete_stop_however_it_arrives(text, stops, cuts):
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    matcher = StopMatcher(stops)
    shown = ""
    expected = cut_at_first_complete(text, stops)
    for start, end in pairwise(bounds):
        shown += matcher.push(text[start:end])
        assert expected.startswith(shown)
    shown += matcher.finish()
    assert shown == expected
    assert (matcher.matched is not None) == (expected != text or _ends_in_stop(text, stops))


def _ends_in_stop(text: str, stops: list[str]) -> bool:
    return any(stop in text for stop in stops)


def test_text_that_cannot_begin_a_stop_is_not_held_back():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hi there.\n") == "Hi there."
    assert matcher.push("\nUs") == ""
    assert matcher.push("ual") == "\n\nUsual"
    assert matcher.matched is None


def test_of_stops_complete_together_the_longer_counts():
    matcher = StopMatcher(["b", "ab"])
    assert matcher.push("xab") == "x"
    assert matcher.matched == "ab"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""
