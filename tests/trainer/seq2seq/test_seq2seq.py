"""Training an encoder-decoder: naive gradients, and the file answers as the trained model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from reft_core.batch import AdapterUse
from reft_core.encoder import EncoderRequest
from reft_core.errors import TrainingError
from reft_core.methods import METHODS
from reft_core.seq2seq import Seq2SeqGenerator
from reft_core.sites import find_layers
from reft_core.spec import TemplateSpec
from tests.factories import assert_close
from tests.reft_core.test_seq2seq import KINDS, NUM_LAYERS, loaded
from tests.trainer.classify.test_task import dataset, letters, word_tokenizer
from tests.trainer.factories import exported, trained
from tests.trainer.naive import edited_row_by_row, gradients, move
from trainer.config import TrainConfig
from trainer.data import Example
from trainer.seq2seq.model import Seq2SeqModel
from trainer.seq2seq.task import Seq2SeqTask


def examples(first: int, count: int) -> list[Example]:
    """Letters, of which the first is to be repeated."""
    asked = [letters(seed) for seed in range(first, first + count)]
    return [Example("here:1", (("user", text),), f"{text[0]} {text[0]}") for text in asked]


def make_task(kind: str, rows: Any = examples, **fields: object) -> Seq2SeqTask:
    given = {"name": "tiny", "train": Path("train"), "valid": Path("valid"), "positions": "prompt"}
    loop = {"epochs": 3, "batch_size": 16, "learning_rate": 2e-2}
    config = TrainConfig.model_validate(given | loop | fields)
    model = replace(loaded(kind), tokenizer=word_tokenizer())
    splits = {"train": dataset(rows(0, 96)), "valid": dataset(rows(1000, 16))}
    return Seq2SeqTask.of(config, model, splits)


def naive_loss(task: Seq2SeqTask, model: Seq2SeqModel, count: int) -> torch.Tensor:
    """Mean over the target tokens of ``count`` rows, one unpadded row at a time."""
    losses = []
    layers = find_layers(model.base.get_encoder(), NUM_LAYERS)
    for row in task.rows["valid"][:count]:
        start = model.base.config.decoder_start_token_id
        read = torch.tensor([[start, *row.completion[:-1]]])
        rule, length = task.config.rule, len(row.prompt)
        with edited_row_by_row(layers, model.interventions, rule, length):
            logits = model.base(
                input_ids=torch.tensor([row.prompt]), decoder_input_ids=read, use_cache=False
            ).logits[0]
        losses.append(F.cross_entropy(logits, torch.tensor(row.completion), reduction="none"))
    return torch.cat(losses).mean()


def check(task: Seq2SeqTask) -> None:
    model = task.new_model()
    move(model.trainable())
    result = model(**task.collator(task.rows["valid"][:3]))
    expected = naive_loss(task, model, 3)
    assert len(result["logits"]) == sum(len(row.completion) for row in task.rows["valid"][:3])
    assert_close(result["loss"], expected)
    parameters = model.trainable()
    wanted = gradients(parameters, expected)
    assert wanted.abs().max() > 1e-4
    assert_close(gradients(parameters, result["loss"]), wanted, tolerance=3e-5)


@pytest.mark.parametrize(("positions", "tied"), [("f2+l2", False), ("l1", True), ("prompt", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_naive_ones(kind: str, positions: str, tied: bool) -> None:
    check(make_task(kind, positions=positions, tied=tied))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_registry_trains(method: str) -> None:
    description = loaded("bart").description
    linear = next(name for name in description.sites if name.endswith("v_proj"))
    has_own_site = METHODS[method].sites[0] in description.sites
    sites = None if has_own_site else (linear,)
    check(make_task("bart", method=method, rank=2, sites=sites))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("t5", {}), ("bart", {"method": "lora", "sites": ("linear:fc1",), "rank": 8})],
)
def test_the_file_answers_as_the_trained_model_does(kind: str, fields: dict[str, Any]) -> None:
    task = make_task(kind, **fields)
    model, result = trained(task)
    assert result.best.valid_loss < 0.9 * result.epochs[0].valid_loss
    uses = (AdapterUse(exported(task, model).to("cpu")),)
    rows = task.rows["valid"]
    generator = Seq2SeqGenerator(task.loaded)
    served = generator.generate([EncoderRequest(row.prompt, uses) for row in rows], 5)
    assert served == [greedy(task, model, row.prompt, 5) for row in rows]
    plain = generator.generate([EncoderRequest(row.prompt) for row in rows], 5)
    assert served != plain, "the training of this test must matter"


@torch.no_grad()
def greedy(
    task: Seq2SeqTask, model: Seq2SeqModel, prompt: tuple[int, ...], max_tokens: int
) -> list[int]:
    """The trained model's own answer; the decoder reads all of it anew for every token."""
    base: Any = model.base
    layers = find_layers(base.get_encoder(), NUM_LAYERS)
    interventions = model.interventions
    with edited_row_by_row(layers, interventions, task.config.rule, len(prompt)):
        encoded = base.get_encoder()(input_ids=torch.tensor([prompt]))
    answer = [base.config.decoder_start_token_id]
    while len(answer) <= max_tokens:
        read = torch.tensor([answer])
        logits = base(encoder_outputs=encoded, decoder_input_ids=read, use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == base.generation_config.eos_token_id:
            return answer[1:-1]
    return answer[1:]


def test_a_prompt_is_the_users_text_or_the_templates() -> None:
    plain = make_task("t5").rows["valid"][0]
    asked = examples(1000, 1)[0]
    tokenizer = word_tokenizer()
    assert list(plain.prompt) == tokenizer(asked.question)["input_ids"]
    assert list(plain.completion) == tokenizer(asked.completion)["input_ids"]
    template = TemplateSpec(user="a {content} b")
    task = make_task("t5", template=template)
    assert list(task.rows["valid"][0].prompt) == tokenizer(f"a {asked.question} b")["input_ids"]
    assert task.parts(task.new_model()).template == template


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "none"}, "method: got 'none', expected one that edits states"),
        ({"method": "prefix_tuning"}, "method: got 'prefix_tuning'"),
        ({"phase": "all"}, "phase: got 'all', expected 'prompt'"),
        ({"max_length": 3}, "here:1: . tokens in its prompt, expected at most 3"),
        ({"positions": "20"}, "positions '20' edit nothing"),
    ],
)
def test_what_an_encoder_decoder_cannot_use_is_named(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        make_task("bart", **fields)
