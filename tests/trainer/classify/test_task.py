"""Whole trainings of a tiny encoder, and the file they leave, served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse
from reft_core.classification import HeadedEncoder
from reft_core.encoder import EncoderRequest
from reft_core.errors import TrainingError
from reft_core.spec import HeadSpec
from tests.reft_core.test_classification import loaded
from tests.trainer.classify.test_model import ROWS
from tests.trainer.factories import exported, trained
from trainer.classify.model import ClassifierModel
from trainer.classify.rows import order_by_length
from trainer.classify.task import ClassifyTask
from trainer.config import TrainConfig
from trainer.data import Dataset, Example

WORDS = ("<s>", "</s>", *"abcdefghijklmnop")


def example(texts: tuple[str, ...], label: str | float | None) -> Example:
    """A row as the data package gives it."""
    turns = (("user", " ".join(texts)),)
    return Example("here:1", turns, str(label), "label", texts, label)


def dataset(examples: list[Example]) -> Dataset:
    return Dataset(Path("rows.jsonl"), tuple(examples), "0" * 64, 0)


def word_tokenizer() -> PreTrainedTokenizerBase:
    """A token a letter, and special ones before, between and behind, with BERT's segments."""
    vocab = {word: 3 + place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def letters(seed: int, among: str = "abcdefghijklmnop") -> str:
    """One to eight letters."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 9, (), generator=generator))
    places = torch.randint(0, len(among), (count,), generator=generator).tolist()
    return " ".join(among[place] for place in places)


def labelled(first: int, count: int) -> list[Example]:
    """Texts labelled by the half of the alphabet that their letters are from."""
    halves = {"early": "abcdefgh", "late": "ijklmnop"}
    return [
        example((letters(seed, halves[label]),), label)
        for seed in range(first, first + count)
        for label in [("early", "late")[seed % 2]]
    ]


def paired(first: int, count: int) -> list[Example]:
    """Pairs whose value counts letters of the second text."""
    return [
        example((letters(2 * seed), letters(2 * seed + 1)), float(len(letters(2 * seed + 1)) // 2))
        for seed in range(first, first + count)
    ]


def make_config(**fields: object) -> TrainConfig:
    given = {"name": "tiny", "train": Path("train"), "valid": Path("valid"), "positions": "f3"}
    loop = {"epochs": 4, "batch_size": 16, "learning_rate": 2e-2}
    return TrainConfig.model_validate(given | loop | fields)


def make_task(kind: str, config: TrainConfig, rows: Any = labelled) -> ClassifyTask:
    model = replace(loaded(kind), tokenizer=word_tokenizer())
    splits = {"train": dataset(rows(0, 128)), "valid": dataset(rows(1000, 48))}
    return ClassifyTask.of(config, model, splits)


def assert_served_as_trained(task: ClassifyTask, model: ClassifierModel) -> Adapter:
    adapter = exported(task, model)
    rows = task.rows["valid"]
    uses = (AdapterUse(adapter.to("cpu")),)
    requests = [EncoderRequest(row.tokens, uses, row.segments) for row in rows]
    served = torch.stack(HeadedEncoder(task.loaded).logits(requests))
    outputs, _ = task.outputs(model, rows)
    torch.testing.assert_close(served, outputs, atol=1e-5, rtol=1e-5)
    return adapter


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bert", {}),
        ("roberta", {"positions": "prompt", "method": "direft"}),
        ("bert", {"method": "lora", "sites": ("linear:attention.self.query",), "rank": 8,
                  "positions": "prompt", "head": {"hidden": 16, "dropout": 0.1}}),
        ("roberta", {"positions": "f1+l1", "tied": False, "head": {"pooling": "first"}}),
    ],
)  # fmt: skip
def test_a_labeller_learns_and_is_served_as_trained(kind: str, fields: dict[str, Any]) -> None:
    task = make_task(kind, make_config(**fields))
    before = task.measure(task.new_model(), task.rows["valid"])
    model, result = trained(task)
    assert result.best.valid_metrics["accuracy"] > max(0.7, before.metrics["accuracy"])
    assert result.best.valid_metrics["accuracy"] == max(
        epoch.valid_metrics["accuracy"] for epoch in result.epochs[1:]
    )
    adapter = assert_served_as_trained(task, model)
    assert adapter.spec.task.labels == ("early", "late")
    assert adapter.spec.head == task.config.head.spec
    assert adapter.spec.positions.tied == task.config.tied


def test_a_regression_on_pairs_learns_and_is_served_as_trained() -> None:
    task = make_task("bert", make_config(epochs=6), paired)
    model, result = trained(task)
    assert result.best.valid_metrics["pearson"] > 0.8
    assert result.best.valid_loss < 0.5 * result.epochs[0].valid_loss
    adapter = assert_served_as_trained(task, model)
    assert adapter.spec.task.kind == "regression"
    assert adapter.head is not None
    assert adapter.head.out_bias.shape == (1,)


def test_a_head_alone_is_a_baseline() -> None:
    task = make_task("bert", make_config(method="none", head={"learning_rate": 0.05}))
    model, result = trained(task)
    assert result.best.valid_metrics["accuracy"] > 0.6
    adapter = assert_served_as_trained(task, model)
    assert (adapter.spec.method, adapter.spec.sites, adapter.edits) == ("none", {}, {})


def test_a_seed_reproduces_a_training() -> None:
    found = []
    for seed in (0, 0, 1):
        task = make_task("bert", make_config(epochs=1, seed=seed, head={"dropout": 0.2}))
        model, _ = trained(task)
        found.append(torch.cat([p.detach().flatten() for p in model.trainable()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_head_may_have_a_rate_of_its_own() -> None:
    task = make_task("bert", make_config(head={"learning_rate": 0.5}))
    model = task.new_model()
    groups = model.parameter_groups(0.1)
    assert [group["lr"] for group in groups] == [0.1, 0.5]
    assert [p for group in groups for p in group["params"]] == model.trainable()
    alone = make_task("bert", make_config(method="none", learning_rate=0.1))
    assert [group["lr"] for group in alone.new_model().parameter_groups(0.1)] == [0.1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (example(("a",), "never"), "here:1: label 'never' is none of early, late"),
        (example(("a",), None), "here:1: an encoder learns rows with a text and a label"),
        (example((" ".join("a" * 41),), "late"), "here:1: 43 tokens, expected at most 42"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(text: Example, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make_task("bert", make_config(), lambda first, _: [text] if first else labelled(0, 8))


def test_the_first_metric_of_the_config_chooses() -> None:
    task = make_task("bert", make_config(metrics=("macro_f1", "matthews")))
    found = task.measure(task.new_model(), task.rows["valid"])
    assert list(found.metrics) == ["macro_f1", "matthews"]
    assert found.rank == (found.metrics["macro_f1"], -found.loss)


def test_settings_that_an_encoder_cannot_use_are_named() -> None:
    config = make_config(method="prompt_tuning", positions="l1")
    with pytest.raises(TrainingError, match=r"method: got 'prompt_tuning'.*without virtual tokens"):
        make_task("bert", config)
    mixed = [example(("a",), 1.0), example(("b",), "late")]
    with pytest.raises(TrainingError, match=r"label 1\.0"):
        make_task("bert", make_config(labels=("early", "late")), lambda *_: mixed)
    with pytest.raises(TrainingError, match="every row has the label 'x'"):
        make_task("bert", make_config(), lambda *_: [example(("a",), "x")] * 2)
    both = [example(("a",), "x"), example(("a",), "y")]
    with pytest.raises(TrainingError, match="positions '5,6' edit nothing"):
        make_task("bert", make_config(positions="5,6"), lambda *_: both)


def test_batches_hold_texts_of_like_length_and_every_row_once() -> None:
    lengths = [1 + (7 * row) % 31 for row in range(203)]
    orders = [order_by_length(lengths, 8, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == list(range(203))
        batches = [[lengths[row] for row in order[i : i + 8]] for i in range(0, 203, 8)]
        spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
        assert spread < 4, "shuffled alone, a batch spans nearly all of 31 lengths"


def test_the_fixture_has_pairs() -> None:
    """Without them no test here would read segments."""
    assert any(1 in row.segments for row in ROWS)
    tokenizer = word_tokenizer()
    assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert HeadSpec() != HeadSpec(pooling="mean")
