"""An encoder's adapters answer by their heads, several in one batch, texts and pairs of them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from reft_core.adapter import decode_adapter
from reft_core.classification import EncoderEngine
from reft_core.errors import InvalidRequest
from reft_core.loading import LoadedModel
from reft_core.spec import HeadSpec
from tests.factories import random_classifier_bytes
from tests.reference.slow import reference_classify
from tests.reft_core.test_classification import loaded
from tests.reft_core.test_classifiers import word_tokenizer
from tests.trainer.factories import write_rows
from trainer.evaluation.asking import Contender
from trainer.evaluation.asking.heads import HeadAsker
from trainer.evaluation.evaluate import EvaluationReport, Options, evaluate_model
from trainer.evaluation.rows import RowSet, read_rows

LABELS = ("no", "yes", "so")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, also of a pair, whose two texts are of one segment."""
    made = deepcopy(word_tokenizer())
    start = made.convert_tokens_to_ids("<s>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    return made


TEXTS = ("a b c", "d e", "f g h i", "j", "c c a", "b")


def contender(seed: int) -> Contender:
    data = random_classifier_bytes(
        loaded("bert").description, 3, HeadSpec(pooling="mean"), seed=seed, labels=LABELS
    )
    adapter = decode_adapter(data)
    return Contender(f"head-{seed}", adapter.digest, adapter)


def ask(rows: RowSet, contenders: list[Contender], *metrics: str) -> EvaluationReport:
    model = loaded("bert")
    engine = EncoderEngine(LoadedModel(model.model, tokenizer(), model.description))
    engine.start()
    try:
        asker = HeadAsker(engine, tokenizer())
        return evaluate_model(asker, rows, contenders, Options(metrics=metrics))
    finally:
        engine.stop()


def test_heads_are_scored_on_texts_and_pairs(tmp_path: Path) -> None:
    rows = read_rows(
        write_rows(
            tmp_path / "test.jsonl",
            [
                {"text": text, "label": LABELS[n % 3]} | ({"text_pair": "b a"} if n % 2 else {})
                for n, text in enumerate(TEXTS)
            ],
        ),
        labels=LABELS,
    )
    contenders = [contender(1), contender(2)]
    report = ask(rows, contenders, "accuracy", "likelihood_accuracy", "macro_f1", "loss")
    for one, result in zip(contenders, report.results, strict=True):
        assert one.adapter is not None
        num_right = 0
        for row, reply in zip(rows.rows, result.replies, strict=True):
            tokens = tokenizer()(*row.texts)["input_ids"]
            logits = reference_classify(loaded("bert").model, tokens, [(one.adapter, 1.0)])
            logprobs = logits.log_softmax(-1).tolist()
            assert reply.logprobs == pytest.approx(tuple(logprobs), abs=1e-4)
            assert reply.text == LABELS[logprobs.index(max(logprobs))]
            assert reply.loss == pytest.approx(-logprobs[LABELS.index(row.answer)], abs=1e-4)
            num_right += reply.text == row.answer
        assert result.metrics["accuracy"].value == pytest.approx(num_right / len(rows.rows))
        assert result.metrics["likelihood_accuracy"] == result.metrics["accuracy"]
    assert report.results[0].replies != report.results[1].replies


def test_labels_that_a_head_does_not_know_are_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": "maybe"}])
    with pytest.raises(InvalidRequest, match=r"t.jsonl:1: label: got 'maybe'.*no, yes, so"):
        ask(read_rows(file), [contender(1)], "accuracy")


def test_scores_need_a_head_with_one_output(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": 2.5}])
    with pytest.raises(InvalidRequest, match=r"t.jsonl:1: 2.5.*labels, no, yes, so"):
        ask(read_rows(file), [contender(1)], "pearson")


def test_an_encoder_alone_answers_nothing(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": "no"}])
    with pytest.raises(InvalidRequest, match="trained head"):
        ask(read_rows(file), [Contender("base", "base")], "accuracy")
