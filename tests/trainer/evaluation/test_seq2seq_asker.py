"""An encoder-decoder's answers and likelihoods equal each row's alone, base and adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from reft_core.adapter import Adapter
from reft_core.errors import InvalidRequest
from reft_core.loading import LoadedModel
from tests.factories import random_adapter
from tests.reference.slow import reference_encode, reference_seq2seq
from tests.reft_core.test_seq2seq import NUM_LAYERS, loaded
from tests.trainer.classify.test_task import word_tokenizer
from tests.trainer.factories import write_rows
from trainer.evaluation.asking import Contender, Question, Reply, Wanted
from trainer.evaluation.asking.seq2seq import Seq2SeqAsker
from trainer.evaluation.evaluate import Options, evaluate_model
from trainer.evaluation.local import contenders_of
from trainer.evaluation.rows import Row, read_rows

LABELS = ("a", "b c", "d")
NESTED = ("a", "a b", "d")
"""One begins another, so that the end token of each counts."""
MAX_TOKENS = 4


def ending_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "</s>"
    return tokenizer


def served(kind: str) -> LoadedModel:
    return replace(loaded(kind), tokenizer=ending_tokenizer())


def adapter(kind: str) -> Adapter:
    return random_adapter(loaded(kind).description, seed=2, method="loreft", positions="prompt")


def slow_reply(kind: str, contender: Contender, row: Row, *, whole: bool) -> Reply:
    """One unpadded row at a time, the decoder reading each answer whole."""
    model, tokenizer = loaded(kind).model, ending_tokenizer()
    prompt = tokenizer(row.question)["input_ids"]
    stack = [] if contender.adapter is None else [(contender.adapter, 1.0)]
    encoded = reference_encode(model.get_encoder(), prompt, stack, NUM_LAYERS)

    def logprob(text: str, *, whole: bool = whole) -> float:
        answer = tokenizer(text)["input_ids"]
        answer = answer if whole else answer[:-1]
        read = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
        logits = model(encoder_outputs=encoded, decoder_input_ids=read).logits[0]
        return float(logits.double().log_softmax(-1)[range(len(answer)), answer].sum())

    ids = reference_seq2seq(model, prompt, MAX_TOKENS, stack, NUM_LAYERS)
    right = row.references[0]
    return Reply(
        tokenizer.decode(ids, skip_special_tokens=True),
        "length" if len(ids) == MAX_TOKENS else "stop",
        tuple(map(logprob, row.candidates)),
        -logprob(right, whole=True),
        len(tokenizer(right)["input_ids"]),
    )


@pytest.mark.parametrize(("labels", "whole"), [(LABELS, False), (NESTED, True)])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_base_and_adapter_equal_each_row_alone(
    kind: str, labels: tuple[str, ...], whole: bool, tmp_path: Path
) -> None:
    texts = ["a b c", "d", "e f g h", "p o", "c c"]
    rows = [{"text": text, "label": labels[n % 3]} for n, text in enumerate(texts)]
    read = read_rows(write_rows(tmp_path / "test.jsonl", list(rows)), labels=labels)
    contenders = contenders_of(served(kind), [None, adapter(kind)], "float32", "plain")
    wanted = Wanted(text=True, choice=True, loss=True, max_tokens=MAX_TOKENS)
    questions = [Question(c, row, wanted) for row in read.rows for c in contenders]
    found = dict(Seq2SeqAsker(served(kind), batch=3).ask(questions))
    for place, question in enumerate(questions):
        expected = slow_reply(kind, question.contender, question.row, whole=whole)
        reply = found[place]
        assert (reply.text, reply.finish_reason) == (expected.text, expected.finish_reason)
        assert reply.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert reply.loss == pytest.approx(expected.loss, abs=1e-4)
        assert reply.num_tokens == expected.num_tokens
    assert found[0].logprobs != found[1].logprobs, "the adapter of this test must matter"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"instruction": " ".join("a" * 60), "completion": "a"},
            "t.jsonl:1: input: got .62 tokens",
        ),
        (
            {"instruction": "a", "completion": " ".join("a" * 60)},
            "t.jsonl:1: completion: got .62 tokens",
        ),
        ({"text": "a b c"}, "t.jsonl:1: got 'a text alone', expected rows that ask something"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(
    row: dict[str, object], problem: str, tmp_path: Path
) -> None:
    rows = read_rows(write_rows(tmp_path / "t.jsonl", [row]))
    with pytest.raises(InvalidRequest, match=problem):
        evaluate_model(
            Seq2SeqAsker(served("bart"), 4), rows, [Contender("base", "base")], Options()
        )
