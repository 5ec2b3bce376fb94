"""Prompts in answers: their text, where their tokens begin, and how likely the model finds them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from reft_core.adapter import decode_adapter
from reft_core.vocabulary import Vocabulary
from server.answering.echo import echo_of
from tests.factories import random_adapter_bytes
from tests.reference.slow import reference_logits
from tests.server.fakes import MODEL, make_tiny_model, make_tokenizer
from tests.server.routes.test_completions import complete, stream

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)


def ids_of(text: str, tokenizer=TOKENIZER) -> list[int]:
    return tokenizer(text)["input_ids"]


def assert_in_step(text: str, token_ids: list[int], offsets: tuple[int, ...]) -> None:
    """Every token that is text by itself stands where its offset says."""
    assert len(offsets) == len(token_ids)
    assert list(offsets) == sorted(offsets)
    for token, offset in zip(token_ids, offsets, strict=True):
        shown, _ = VOCABULARY.describe(token)
        if token in VOCABULARY.special_ids or shown.startswith("bytes:"):
            continue
        assert text[offset:].startswith(shown)


# Text and offsets ---------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=30))
def test_offsets_of_a_text(text):
    echo = echo_of(VOCABULARY, ids_of(text), text)
    assert echo.text == text
    assert_in_step(text, ids_of(text), echo.offsets)


@given(st.text(min_size=1, max_size=30))
def test_offsets_of_tokens(text):
    echo = echo_of(VOCABULARY, ids_of(text), None)
    assert echo.text == text
    assert_in_step(text, ids_of(text), echo.offsets)


def test_tokens_of_one_character_share_its_offset():
    echo = echo_of(VOCABULARY, ids_of("a😀b"), "a😀b")
    assert echo.offsets == (0, 1, 1, 1, 1, 2)


def test_special_tokens_have_room_in_a_text_and_none_among_tokens():
    text = "<|im_start|>hello<|im_end|>!"
    token_ids = ids_of(text)
    written = echo_of(VOCABULARY, token_ids, text)
    assert (written.text, written.offsets) == (text, (0, 12, 14, 15, 16, 17, 27))
    sent = echo_of(VOCABULARY, token_ids, None)
    assert (sent.text, sent.offsets) == ("hello!", (0, 0, 2, 3, 4, 5, 5))


def test_tokens_around_a_text_have_no_room():
    tokenizer = make_tokenizer()
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)],
    )
    token_ids = ids_of("abc", tokenizer)
    assert (token_ids[0], token_ids[-1], len(token_ids)) == (start, end, 5)
    echo = echo_of(Vocabulary(tokenizer), token_ids, "abc")
    assert (echo.text, echo.offsets) == ("abc", (0, 0, 1, 2, 3))


def test_a_text_that_the_tokenizer_changed_is_shown_as_it_was_read():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    echo = echo_of(Vocabulary(tokenizer), ids_of("ABC", tokenizer), "ABC")
    assert (echo.text, echo.offsets) == ("abc", (0, 1, 2))


# Over HTTP ----------------------------------------------------------------------------------


def test_echo_with_logprobs_begins_with_null(server, engine):
    (choice,) = complete(server, prompt="heya", echo=True, logprobs=2, max_tokens=3)["choices"]
    assert choice["text"] == "heyaI a"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["he", "y", "a", "I", " ", "a"]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -0.5, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 2, 3, 4, 5, 6]
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["top_logprobs"][1]) == 3, "two likeliest, and the prompt's own"
    assert logprobs["top_logprobs"][1]["y"] == -1.0
    assert engine.submitted[-1].params.prompt_logprobs == 2


def test_echo_alone_asks_for_no_scores(server, engine):
    (choice,) = complete(server, prompt="heya", echo=True, max_tokens=2)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("heyaI ", None)
    assert engine.submitted[-1].params.prompt_logprobs is None


def test_the_prompt_alone(server, engine):
    """As with max_tokens 0 in OpenAI's API."""
    body = complete(server, prompt=["hey", "ab"], echo=True, logprobs=0, max_tokens=0)
    assert [choice["text"] for choice in body["choices"]] == ["hey", "ab"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]
    assert [c["logprobs"]["token_logprobs"] for c in body["choices"]] == [[None, -1.0]] * 2
    assert body["usage"]["completion_tokens"] == 0
    assert complete(server, echo=True, max_tokens=0)["choices"][0]["text"] == "hi"
    assert {request.params.max_tokens for request in engine.submitted} == {0}


def test_a_prompt_of_one_token(server):
    (choice,) = complete(server, prompt="x", echo=True, logprobs=1, max_tokens=0)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["x"],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }


def test_a_token_that_ends_the_answer_is_listed_without_text(server, engine):
    """So that the lists have an entry for every token, which is how clients tell the prompt's
    from the answer's.
    """
    engine.reply = lambda _: []
    for streaming in (False, True):
        body = {"prompt": "hey", "echo": True, "logprobs": 1, "max_tokens": 1}
        chunks = stream(server, **body) if streaming else [complete(server, **body)]
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(choice["text"] for choice in choices) == "hey"
        tokens = [t for choice in choices for t in choice["logprobs"]["tokens"]]
        assert tokens == ["he", "y", "<|im_end|>"]
        assert [o for choice in choices for o in choice["logprobs"]["text_offset"]] == [0, 2, 3]


def test_streamed_pieces_join_to_the_whole(server, engine):
    """The prompt comes once for each choice, before its answer."""
    engine.reply = lambda request: f"<{request.params.seed}>"
    body = {"prompt": ["heya", "😀"], "n": 2, "seed": 3, "echo": True, "logprobs": 1}
    whole = {choice["index"]: choice for choice in complete(server, **body)["choices"]}
    joined: dict[int, dict] = {}
    for chunk in stream(server, **body):
        (choice,) = chunk["choices"]
        so_far = joined.setdefault(choice["index"], {"text": "", "logprobs": {}})
        so_far["text"] += choice["text"]
        for name, values in choice["logprobs"].items():
            so_far["logprobs"].setdefault(name, []).extend(values)
    assert len(joined) == 4
    for index, choice in joined.items():
        assert choice["text"] == whole[index]["text"]
        assert choice["logprobs"] == whole[index]["logprobs"]
    assert whole[0]["text"] == "heya<3>"
    assert whole[1]["text"] == "heya<4>"


def test_one_choice_scores_the_prompt_for_all(server, engine):
    """Also when another choice's tokens come first."""
    engine.pause()
    engine.step(1)
    real = engine._rows
    engine._rows = lambda: list(reversed(real()))
    engine.resume()
    body = complete(server, prompt=["hey", "heya"], n=3, echo=True, logprobs=1, max_tokens=2)
    numbers = [len(choice["logprobs"]["tokens"]) for choice in body["choices"]]
    assert numbers == [4, 4, 4, 5, 5, 5]
    assert [r.params.prompt_logprobs for r in engine.submitted] == [1, None, None] * 2


def test_prompt_logprobs_have_vllms_shape(server):
    (choice,) = complete(server, prompt="heya", prompt_logprobs=2, max_tokens=1)["choices"]
    he, y, a = ids_of("heya")
    assert choice["text"] == "I"
    assert choice["logprobs"] is None
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert list(second) == [str(y), str(y + 1), str(y + 2)]
    assert second[str(y)] == {"logprob": -1.0, "rank": 2, "decoded_token": "y"}
    assert second[str(y + 1)]["rank"] == 1
    assert third[str(a)]["decoded_token"] == "a"
    assert he not in second
    assert "prompt_logprobs" not in complete(server)["choices"][0]


def test_prompt_logprobs_and_echo_each_have_their_number(server, engine):
    (choice,) = complete(
        server, prompt="hey", prompt_logprobs=3, echo=True, logprobs=1, max_tokens=1
    )["choices"]
    assert len(choice["prompt_logprobs"][1]) == 4
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2
    assert engine.submitted[-1].params.prompt_logprobs == 3


def test_prompt_logprobs_of_a_conversation(server, engine):
    body = {"model": MODEL.name, "messages": [{"role": "user", "content": "hey"}]}
    plain = server.http.post("/v1/chat/completions", json=body).json()
    assert "prompt_logprobs" not in plain
    scored = server.http.post("/v1/chat/completions", json=body | {"prompt_logprobs": 0}).json()
    assert [len(entry) for entry in scored["prompt_logprobs"][1:]] == [1] * (
        scored["usage"]["prompt_tokens"] - 1
    )
    assert scored["prompt_logprobs"][0] is None
    assert scored["choices"] == plain["choices"]
    none = body | {"prompt_logprobs": 1, "max_tokens": 0}
    answer = server.http.post("/v1/chat/completions", json=none).json()
    assert answer["choices"][0]["message"]["content"] == ""


def test_the_official_client_reads_them(live):
    with live.openai() as client:
        answer = client.completions.create(
            model=MODEL.name, prompt="hey", echo=True, logprobs=1, max_tokens=0
        )
        assert answer.choices[0].logprobs.token_logprobs == [None, -1.0]
        text = ""
        for chunk in client.completions.create(
            model=MODEL.name, prompt="hey", echo=True, logprobs=1, max_tokens=2, stream=True
        ):
            text += chunk.choices[0].text
        assert text == "heyI "
        chat = client.chat.completions.create(
            model=MODEL.name,
            messages=[{"role": "user", "content": "hey"}],
            extra_body={"prompt_logprobs": 1},
        )
        assert chat.prompt_logprobs[0] is None


# With a model -------------------------------------------------------------------------------


def loglikelihoods(answer: dict, num_context: list[int]) -> list[tuple[float, bool]]:
    """What lm-evaluation-harness's client makes of an answer: the sum over the continuation,
    and whether greedy decoding would have given it. The last entry is the generated token's.
    """
    found = []
    for choice, skip in zip(answer["choices"], num_context, strict=True):
        logprobs = choice["logprobs"]
        own = logprobs["token_logprobs"][skip:-1]
        tops = logprobs["top_logprobs"][skip:-1]
        greedy = all(value == max(top.values()) for value, top in zip(own, tops, strict=True))
        found.append((sum(own), greedy))
    return found


@pytest.mark.parametrize("max_tokens", [1, 0])
@pytest.mark.parametrize("model", ["tiny", "everywhere"])
def test_loglikelihoods_as_an_evaluation_asks_for_them(tiny, model, max_tokens):
    """Prompts as token ids, scored with an adapter or none, against the slow reference."""
    data = random_adapter_bytes(
        tiny.services.engine.model, seed=1, size=2.0, positions="prompt", name="everywhere"
    )
    tiny.upload("everywhere", data)
    adapter = decode_adapter(data) if model == "everywhere" else None
    reference = make_tiny_model()
    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (1, 5, 30)]
    prompts = [[*context, context[0], 7, 9] for context in contexts]
    # One continuation is the likeliest.
    rows = reference_logits(reference, contexts[1], 5)
    prompts.append([*contexts[1], int(rows[-1].argmax())])
    num_context = [*map(len, contexts), 5]
    answer = tiny.http.post(
        "/v1/completions",
        json={
            "model": model,
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": max_tokens,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if max_tokens == 0:  # nothing to leave out at the end
        for choice in body["choices"]:
            for values in choice["logprobs"].values():
                values.append(None)
    found = loglikelihoods(body, num_context)
    for prompt, skip, (total, greedy) in zip(prompts, num_context, found, strict=True):
        logits = reference_logits(reference, prompt, len(prompt), adapter)
        logprobs = torch.log_softmax(logits, dim=-1)
        places = range(skip - 1, len(prompt) - 1)
        expected = sum(float(logprobs[at, prompt[at + 1]]) for at in places)
        assert total == pytest.approx(expected, abs=1e-2)
        assert greedy == all(int(logprobs[at].argmax()) == prompt[at + 1] for at in places)
    if model == "tiny":
        assert [greedy for _, greedy in found][-1]


def test_the_whole_context_may_be_scored(tiny):
    body = {"model": "tiny", "prompt": [5] * 512, "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = tiny.http.post("/v1/completions", json=body)
    logprobs = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    assert len(logprobs) == 512
    assert all(math.isfinite(value) for value in logprobs[1:])
    refused = tiny.http.post("/v1/completions", json=body | {"max_tokens": 1})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert json.loads(answer.text)["usage"]["total_tokens"] == 512
