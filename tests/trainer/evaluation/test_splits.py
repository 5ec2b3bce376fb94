from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from reft_core.engine.interface import Engine, Output, OutputSink, Request, Ticket, Token
from reft_core.methods.placement import Placement
from reft_core.positions import PositionRule
from tests.trainer.factories import byte_model, byte_tokenizer, write_rows
from trainer.collate import Collator
from trainer.data import load_dataset, tokenise
from trainer.evaluation.splits import evaluate, generate, likeliest_labels
from trainer.reft_model import ReftModel

RULE = PositionRule.parse("l1")


class FakeEngine:
    """Answers at once: the base with the text ``base``, an adapter with its own digest."""

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.requests: list[Request] = []

    def submit(self, request: Request, sink: OutputSink) -> Ticket:
        self.requests.append(request)
        text = (request.adapters[0].digest if request.adapters else "base") + "<end>"
        tokens = self.tokenizer(text)["input_ids"][: request.params.max_tokens]
        for token in tokens[:-1]:
            sink(Output(request.request_id, Token(token)))
        sink(Output(request.request_id, Token(tokens[-1]), "stop"))
        return Ticket(request.request_id, len(request.prompt), 1)

    def cancel(self, request_id: str) -> None:
        raise AssertionError("nothing is to be cancelled")


def fake() -> tuple[FakeEngine, Engine]:
    engine = FakeEngine()
    return engine, engine  # type: ignore[return-value]


def test_generation_is_greedy_capped_and_in_order() -> None:
    log, engine = fake()
    answers = generate(engine, [[1, 2], [3]], "yes", max_tokens=2)
    tokens = log.tokenizer("ye")["input_ids"]
    assert answers == [tokens, tokens]
    assert [request.prompt for request in log.requests] == [(1, 2), (3,)]
    assert all(r.params.is_greedy and r.params.max_tokens == 2 for r in log.requests)


def test_base_and_adapter_are_scored_on_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "completion": "yes"},
        {"instruction": "b", "completion": "no"},
        {"instruction": "c", "completion": "base"},
        {"instruction": "d", "completion": "base"},
    ]
    dataset = load_dataset(write_rows(tmp_path / "rows.jsonl", rows))
    log, engine = fake()
    found = evaluate(
        engine,
        log.tokenizer,
        dataset,
        tokenise(dataset, log.tokenizer, RULE, max_length=100),
        adapter="yes",
        metrics=["exact_match", "emoji_only"],
        labels=["yes", "no", "base"],
        max_tokens=8,
    )
    assert found.metrics == {
        "exact_match": 0.25,
        "base_exact_match": 0.5,
        "emoji_only": 0.0,
        "base_emoji_only": 0.0,
    }
    assert found.confusion is not None
    assert found.confusion.counts["no"]["yes"] == 1
    assert found.samples[0].question == "a"
    assert (found.samples[0].base, found.samples[0].adapter) == ("base", "yes")
    assert len(found.samples) == 4


def test_the_likeliest_label_is_that_of_highest_probability(tmp_path: Path) -> None:
    loaded = byte_model()
    labels = ["yes", "nay", "hmm"]
    rows = [{"instruction": str(i), "completion": "yes"} for i in range(7)]
    dataset = load_dataset(write_rows(tmp_path / "rows.jsonl", rows))
    tokens = tokenise(dataset, loaded.tokenizer, RULE, max_length=100)
    torch.manual_seed(1)
    model = ReftModel(
        loaded.model,
        Placement.on(loaded.description, "loreft", layers=(0, 1), rank=2),
        num_units=1,
    )
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.add_(4 * torch.randn_like(parameter))

    def ask(edited: bool) -> list[str]:
        return likeliest_labels(
            model,
            loaded.tokenizer,
            tokens,
            labels,
            Collator(RULE),
            batch_size=4,
            edited=edited,
        )

    expected = []
    for row in tokens:
        scores = []
        for label in labels:
            answer = loaded.tokenizer(label)["input_ids"]  # none begins another
            logits = loaded.model(torch.tensor([[*row.prompt, *answer]])).logits[0]
            losses = F.cross_entropy(
                logits[len(row.prompt) - 1 : -1], torch.tensor(answer), reduction="sum"
            )
            scores.append(-losses.item())
        expected.append(labels[scores.index(max(scores))])
    assert ask(edited=False) == expected
    assert ask(edited=True) != expected
