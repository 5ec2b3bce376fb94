"""A byte tokenizer, a tiny base that uses it, and small data files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from reft_core.adapter import Adapter, decode_adapter, encode_adapter
from reft_core.loading import LoadedModel
from reft_core.sites import describe_model
from reft_core.spec import AdapterSpec
from trainer.classify.task import ClassifyTask
from trainer.config import TrainConfig
from trainer.fit import FitResult, fit
from trainer.progress import SilentProgress
from trainer.seq2seq.task import Seq2SeqTask

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, and one for each role and for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<system>", "<user>", "<assistant>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT_TEMPLATE
    )


def byte_model(seed: int = 0) -> LoadedModel:
    """A tiny random llama over bytes."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.2)
    return LoadedModel(model, tokenizer, describe_model(model, "tiny-bytes"))


def write_rows(path: Path, rows: list[object]) -> Path:
    """The rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def label_rows(first: int, count: int) -> list[object]:
    """Rows whose label is told by their last letter."""
    return [
        {"instruction": f"no {number} {'ab'[number % 2]}", "completion": "yn"[number % 2]}
        for number in range(first, first + count)
    ]


def make_config(folder: Path, **fields: object) -> TrainConfig:
    """A config for a tiny labeller whose data and outputs lie in ``folder``."""
    values = {
        "name": "tiny",
        "rank": 2,
        "epochs": 3,
        "batch_size": 8,
        "learning_rate": 2e-2,
        "train": write_rows(folder / "train.jsonl", label_rows(0, 40)),
        "valid": write_rows(folder / "valid.jsonl", label_rows(40, 10)),
        "test": write_rows(folder / "test.jsonl", label_rows(60, 6)),
        "output": folder / "out" / "tiny.safetensors",
    }
    return TrainConfig.model_validate(values | fields)


def trained(task: ClassifyTask | Seq2SeqTask) -> tuple[Any, FitResult]:
    """A task's model after its training, and how that went."""
    model = task.new_model()
    result = fit(
        model,
        task.rows["train"],
        task.rows["valid"],
        task.config,
        task.collator,
        SilentProgress(),
        measure=partial(task.measure, model),
        order=task.order,
    )
    return model, result


def exported(task: ClassifyTask | Seq2SeqTask, model: Any) -> Adapter:
    """The model's file, read back."""
    parts = task.parts(model)
    spec = AdapterSpec(
        name="tiny",
        base=task.loaded.description.to_base_spec(),
        method=task.config.method,
        positions=task.config.position_spec,
        sites=parts.sites,
        task=parts.task,
        template=parts.template,
        head=parts.head_spec,
    )
    return decode_adapter(encode_adapter(spec, parts.edits, head=parts.head))
