"""Whole comparisons on a tiny random T5."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reft_core.errors import TrainingError
from reft_core.loading import LoadedModel
from tests.reft_core.test_seq2seq import loaded
from tests.trainer.classify.test_task import word_tokenizer
from tests.trainer.compare.factories import tiny_comparison
from tests.trainer.factories import write_rows
from tests.trainer.seq2seq.test_seq2seq import examples
from trainer.compare.run import Comparison, compare
from trainer.compare.table import table_rows
from trainer.config import TrainConfig

METHODS = ("zero_shot", "few_shot", "peft_lora", "lora", "red", "loreft", "full_finetuning")


def encoder_decoder() -> LoadedModel:
    return replace(loaded("t5"), tokenizer=word_tokenizer())


def run(folder: Path, base: LoadedModel, **fields: object) -> Comparison:
    files = {}
    for name, start, count in (("train", 0, 96), ("valid", 1000, 16), ("test", 2000, 16)):
        rows = [
            {"instruction": e.turns[0][1], "completion": e.completion}
            for e in examples(start, count)
        ]
        files[name] = write_rows(folder / f"{name}.jsonl", rows)
    loop = {"epochs": 1, "batch_size": 16, "leaks": "drop", "metrics": ("chrf",)}
    config = TrainConfig.model_validate({"name": "tiny", **files, **loop})
    return compare(config, tiny_comparison(folder, **fields), loaded=base)


def test_methods_are_compared_by_the_answers_that_are_written(tmp_path: Path) -> None:
    base = encoder_decoder()
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    settings = {"full_finetuning": {"learning_rate": 1e-2}, "peft_lora": {"learning_rate": 1e-2}}
    found = run(tmp_path, base, methods=METHODS, settings=settings)
    rows = {row.method: row for row in table_rows(found)}
    assert found.metric.name == "chrf"
    assert tuple(rows) == tuple(name for name in METHODS if name != "few_shot")
    assert "no turns" in found.left_out["few_shot"]
    assert all(row.quality and not row.error for row in rows.values())
    assert rows["loreft"].serving_scope == rows["lora"].serving_scope == "prompt"
    assert rows["peft_lora"].serving_scope == "every token"
    assert rows["peft_lora"].serving_extra_percent > rows["lora"].serving_extra_percent > 0
    answers = {name: records[0]["answers"]["texts"] for name, records in found.finals.items()}
    assert answers["full_finetuning"] != answers["zero_shot"] != answers["peft_lora"]
    for name in ("loreft", "peft_lora", "full_finetuning"):
        (record,) = found.finals[name]
        assert min(record["valid_losses"][1:]) < record["valid_losses"][0]
    after = base.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_what_has_no_place_is_refused_when_it_is_all_there_is(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"head_only: .*; peft_prefix_tuning: virtual tokens"):
        run(tmp_path, encoder_decoder(), methods=("head_only", "peft_prefix_tuning"))
