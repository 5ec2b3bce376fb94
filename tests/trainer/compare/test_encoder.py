"""Whole comparisons on a tiny random BERT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reft_core.batch import AdapterUse
from reft_core.classification import HeadedEncoder
from reft_core.encoder import EncoderRequest
from reft_core.errors import TrainingError
from reft_core.loading import LoadedModel
from tests.reft_core.test_classification import loaded
from tests.trainer.classify.test_task import labelled, paired, word_tokenizer
from tests.trainer.compare.factories import tiny_comparison
from tests.trainer.factories import write_rows
from trainer.compare.arena import arena_for
from trainer.compare.contenders import CONTENDERS
from trainer.compare.learners import open_learner
from trainer.compare.report import write_report
from trainer.compare.run import Comparison, compare
from trainer.compare.settings import training_config
from trainer.compare.table import table_rows
from trainer.compare.task import fit_on, load_task, load_test
from trainer.config import TrainConfig

METHODS = ("zero_shot", "head_only", "peft_lora", "lora", "series_adapter", "loreft")
TRAINED = (*METHODS[1:], "parallel_adapter", "red", "direft", "noreft", "full_finetuning")


def encoder() -> LoadedModel:
    return replace(loaded("bert"), tokenizer=word_tokenizer())


def make_config(folder: Path, rows: object = labelled, **fields: object) -> TrainConfig:
    files = {}
    for name, start, count in (("train", 0, 128), ("valid", 1000, 48), ("test", 2000, 32)):
        examples = rows(start, count)  # type: ignore[operator]
        names = ("text", "text_pair")
        texts = [dict(zip(names, e.texts, strict=False)) | {"label": e.label} for e in examples]
        files[name] = write_rows(folder / f"{name}.jsonl", texts)
    loop = {"epochs": 2, "batch_size": 16, "leaks": "drop"}
    return TrainConfig.model_validate({"name": "tiny", **files, **loop, **fields})


def run(folder: Path, config: TrainConfig, **fields: object) -> Comparison:
    return compare(config, tiny_comparison(folder, **fields), loaded=encoder())


def test_methods_share_a_head_and_those_without_a_place_are_told(tmp_path: Path) -> None:
    found = run(tmp_path, make_config(tmp_path), methods=METHODS, reference="peft_lora")
    rows = {row.method: row for row in table_rows(found)}
    assert tuple(rows) == METHODS[1:]
    assert found.metric.name == "accuracy"
    assert all(row.quality and not row.error for row in rows.values())
    head = rows["head_only"].num_parameters
    assert rows["peft_lora"].num_parameters == rows["lora"].num_parameters > head
    assert rows["peft_lora"].serving_extra_percent == rows["lora"].serving_extra_percent
    assert rows["head_only"].serving_scope == "head"
    assert rows["loreft"].serving_scope == rows["series_adapter"].serving_scope == "text"
    assert rows["loreft"].training_cpu_seconds > 0
    write_report(found, list(rows.values()), "")
    report = (tmp_path / "compared" / "report.md").read_text()
    assert "- zero-shot: an encoder writes no answers" in report
    assert "best validation accuracy" in report
    assert "training, CPU s" in report


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_learns_and_leaves_the_base_alone(tmp_path: Path, name: str) -> None:
    """And what it saves, served, answers as the model does."""
    task = load_task(make_config(tmp_path, epochs=6), loaded=encoder())
    arena, contender = arena_for(task), CONTENDERS[name].on("encoder")
    assert arena.why_not(contender) is None
    (setting,) = contender.settings(1)
    comparison = tiny_comparison(tmp_path, methods=(name,))
    config = training_config(arena, contender, setting, 0, comparison)
    base = task.loaded.model
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    test = load_test(task)
    with open_learner(contender, config, task) as learner:
        result = fit_on(task, config, learner.model)
        saved = learner.save(result)
        outputs = arena.outputs(learner.model, test)  # type: ignore[attr-defined]
    assert result.best.valid_loss < result.epochs[0].valid_loss
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    if name == "full_finetuning":
        assert saved.adapter is None
        return
    assert saved.adapter is not None
    requests = [
        EncoderRequest(row.tokens, (AdapterUse(saved.adapter),), row.segments) for row in test.rows
    ]
    served = torch.stack(HeadedEncoder(task.loaded).logits(requests))
    torch.testing.assert_close(served, outputs, atol=1e-4, rtol=1e-4)


def test_values_are_compared_by_their_correlation(tmp_path: Path) -> None:
    found = run(tmp_path, make_config(tmp_path, paired), methods=("loreft", "full_finetuning"))
    assert found.metric.name == "pearson"
    assert [row.error for row in table_rows(found)] == ["", ""]
    (record,) = found.finals["loreft"]
    assert -1 <= record["test"]["pearson"] <= 1


def test_settings_list_what_a_search_tries(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=1, metrics=("matthews",))
    settings = {
        "loreft": {
            "positions": ["prompt", "f2"],
            "layers": [0, 1],
            "rank": [2, 4],
            "head": {"learning_rate": [1e-3, 1e-2], "pooling": "first"},
        },
        "head_only": {"learning_rate": [1e-2, 1e-1]},
    }
    methods = ("loreft", "head_only")
    found = run(tmp_path, config, methods=methods, search=5, settings=settings)
    assert found.metric.name == "matthews"
    folder = tmp_path / "compared" / "results" / "search"
    tried = {
        name: [json.loads(path.read_text()) for path in (folder / name).iterdir()]
        for name in methods
    }
    assert sorted(r["setting"]["learning_rate"] for r in tried["head_only"]) == [1e-2, 1e-1]
    names = {"positions", "rank", "head.learning_rate", "learning_rate"}
    assert all(record["setting"].keys() == names for record in tried["loreft"])
    combined = {
        tuple(r["setting"][n] for n in sorted(names - {"learning_rate"})) for r in tried["loreft"]
    }
    assert len(combined) == 5, "each combination once before any comes again"
    best = max(tried["loreft"], key=lambda r: (r["valid"]["matthews"], -r["valid"]["loss"]))
    assert found.chosen["loreft"] == best["setting"]


def test_a_comparison_of_prompts_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="zero_shot: an encoder writes no answers"):
        run(tmp_path, make_config(tmp_path), methods=("zero_shot",))
    with pytest.raises(TrainingError, match="measure_serving: got 4, expected 0"):
        run(tmp_path, make_config(tmp_path), methods=("head_only",), measure_serving=4)
