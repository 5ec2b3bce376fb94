"""What the engine says of many rows at once equals one forward a text, written out."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.errors import InvalidRequest
from reft_core.loading import LoadedModel
from reft_core.spec import TemplateSpec
from reft_core.templates import encode_chat
from tests.factories import random_adapter
from tests.reference.slow import reference_generate, reference_logits
from tests.trainer.factories import byte_model, write_rows
from trainer.evaluation.asking import Contender, EngineAsker, Question, Reply, Wanted
from trainer.evaluation.asking import engine as asking_engine
from trainer.evaluation.evaluate import Options, evaluate_model
from trainer.evaluation.local import LocalAsker, contenders_of
from trainer.evaluation.rows import Row, RowSet, read_rows

LABELS = ("yes", "no", "no way")
TEMPLATE = TemplateSpec(user="{content}", generation="?")
MAX_TOKENS = 5


def rows_in(folder: Path, count: int = 6, labels: tuple[str, ...] = LABELS) -> RowSet:
    rows: list[object] = [{"text": f"is it {n}", "label": labels[n % 3]} for n in range(count)]
    return read_rows(write_rows(folder / "test.jsonl", rows), labels=labels)


def two_adapters(loaded: LoadedModel) -> list[Adapter]:
    return [
        random_adapter(loaded.description, seed=1, size=4, name="one", positions="l1"),
        random_adapter(
            loaded.description, seed=2, size=4, name="two", positions="f2+l2", template=TEMPLATE
        ),
    ]


def slow_reply(loaded: LoadedModel, contender: Contender, row: Row) -> Reply:
    """By the reference: a forward for each label, and for each token of the greedy answer."""
    tokenizer = loaded.tokenizer
    prompt = encode_chat(tokenizer, row.messages, contender.template)

    def logprob(answer: list[int]) -> float:
        logits = reference_logits(loaded.model, [*prompt, *answer], len(prompt), contender.adapter)
        of_answer = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        return float(of_answer[torch.arange(len(answer)), torch.tensor(answer)].sum())

    answers = {text: tokenizer(f"{text}<end>")["input_ids"] for text in row.candidates}
    names = row.candidates
    ends = any(a != b and b.startswith(a) for a in names for b in names)
    ids = reference_generate(loaded.model, tuple(prompt), MAX_TOKENS, contender.adapter)
    end = tokenizer.eos_token_id
    stopped = end in ids
    text = tokenizer.decode(ids[: ids.index(end)] if stopped else ids, skip_special_tokens=True)
    right = row.references[0]
    return Reply(
        text,
        "stop" if stopped else "length",
        tuple(logprob(answers[name] if ends else answers[name][:-1]) for name in names),
        -logprob(answers[right]),
        len(answers[right]),
    )


def assert_alike(found: Reply, expected: Reply) -> None:
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert found.loss == pytest.approx(expected.loss, abs=1e-3)
    assert found.num_tokens == expected.num_tokens


@pytest.mark.parametrize("labels", [LABELS, ("yes", "no", "so")])
def test_base_and_adapters_in_one_batch_equal_each_row_alone(
    labels: tuple[str, ...], tmp_path: Path
) -> None:
    loaded = byte_model()
    rows = rows_in(tmp_path, labels=labels).rows
    contenders = contenders_of(loaded, [None, *two_adapters(loaded)], "float32")
    assert [c.name for c in contenders] == ["base", "one", "two"]
    assert [c.template for c in contenders] == [None, None, TEMPLATE]
    wanted = Wanted(text=True, choice=True, loss=True, max_tokens=MAX_TOKENS)
    questions = [Question(c, row, wanted) for row in rows for c in contenders]
    expected = [slow_reply(byte_model(), q.contender, q.row) for q in questions]
    found = dict(LocalAsker(loaded, batch=4).ask(questions))
    assert sorted(found) == list(range(len(questions)))
    for place, reply in found.items():
        assert_alike(reply, expected[place])
    # The contenders differ, or the test could not tell them apart.
    assert len({reply.logprobs for reply in expected[:3]}) == 3


def test_choices_that_are_not_wanted_are_not_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking_engine, "answer_tokens", Mock(side_effect=AssertionError))
    base = Contender("base", "base")
    questions = [Question(base, row, Wanted()) for row in rows_in(tmp_path).rows]
    found = dict(LocalAsker(byte_model()).ask(questions))
    assert [found[place].logprobs for place in range(6)] == [()] * 6


def test_a_queue_that_is_full_is_waited_for(tmp_path: Path) -> None:
    loaded = byte_model()
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=64, max_num_seqs=2, max_waiting=1))
    engine.start()
    try:
        base = Contender("base", "base")
        found = evaluate_model(
            EngineAsker(engine, loaded.tokenizer), rows_in(tmp_path), [base], Options(seed=1)
        )
    finally:
        engine.stop()
    assert len(found.results[0].replies) == 6
    assert all(len(reply.logprobs) == 3 for reply in found.results[0].replies)


def test_a_text_alone_is_read_behind_its_first_token(tmp_path: Path) -> None:
    loaded = byte_model()
    texts = ["abcd", "xyzxyzxyz"]
    file = write_rows(tmp_path / "t.jsonl", [{"id": text[0], "text": text} for text in texts])
    adapter = random_adapter(loaded.description, seed=1, size=4, name="one", positions="l1")
    report = evaluate_model(
        LocalAsker(loaded), read_rows(file), contenders_of(loaded, [None, adapter], "float32")
    )
    base, one = report.results
    assert set(base.metrics) == {"loss", "perplexity"}
    for result, edit in ((base, None), (one, adapter)):
        losses, count = 0.0, 0
        for text, reply in zip(texts, result.replies, strict=True):
            ids = loaded.tokenizer(text)["input_ids"]
            logits = reference_logits(byte_model().model, ids, 1, edit)
            logprobs = logits[:-1].double().log_softmax(-1)
            expected = -float(logprobs[range(len(ids) - 1), ids[1:]].sum())
            assert (reply.loss, reply.num_tokens) == (
                pytest.approx(expected, abs=1e-3),
                len(ids) - 1,
            )
            losses, count = losses + expected, count + len(ids) - 1
        assert result.metrics["perplexity"].value == pytest.approx(
            math.exp(losses / count), rel=1e-4
        )
    assert base.replies != one.replies


def test_a_row_beyond_the_context_is_named(tmp_path: Path) -> None:
    loaded = byte_model()
    file = write_rows(
        tmp_path / "test.jsonl",
        [{"text": "x", "label": "a"}, {"text": "y" * 200, "label": "b"}],
    )
    with pytest.raises(InvalidRequest, match=r"test.jsonl:2: prompt: got .* at most 128"):
        evaluate_model(LocalAsker(loaded), read_rows(file), [Contender("base", "base")])


def test_an_answer_is_cut_where_the_context_ends(tmp_path: Path) -> None:
    loaded = byte_model()
    file = write_rows(tmp_path / "t.jsonl", [{"instruction": "y" * 100, "completion": "a"}])
    found = evaluate_model(
        LocalAsker(loaded),
        read_rows(file),
        [Contender("base", "base")],
        Options(metrics=("exact_match",), max_tokens=500),
    )
    assert found.results[0].replies[0].finish_reason == "length"


def test_a_report_compares_with_the_first_contender(tmp_path: Path) -> None:
    loaded = byte_model()
    rows = rows_in(tmp_path, 9)
    contenders = contenders_of(loaded, [None, two_adapters(loaded)[0]], "float32")
    report = evaluate_model(LocalAsker(loaded), rows, contenders)
    base, one = report.results
    assert base.differences == {}
    for name, found in one.differences.items():
        gap = one.metrics[name].value - base.metrics[name].value
        assert found.value == pytest.approx(gap)
        assert found.low <= gap <= found.high
    right = sum(row.answer == a.choice for row, a in zip(rows.rows, one.answered, strict=True))
    assert one.metrics["likelihood_accuracy"].value == pytest.approx(right / 9)
    assert sum(map(sum, (c.values() for c in one.confusions["choice"].counts.values()))) == 9
    assert report.values["one"]["loss"] == one.metrics["loss"].value
