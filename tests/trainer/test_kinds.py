"""Whole runs on an encoder and on an encoder-decoder, from files to what is served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reft_core.adapter import read_adapter
from reft_core.batch import AdapterUse
from reft_core.classification import HeadedEncoder
from reft_core.encoder import EncoderRequest
from reft_core.errors import TrainingError
from reft_core.loading import LoadedModel
from reft_core.seq2seq import Seq2SeqGenerator
from reft_core.templates import encode_pair, encode_text, render_text
from tests.reft_core import test_classification, test_seq2seq
from tests.trainer.classify.test_task import labelled, paired, word_tokenizer
from tests.trainer.factories import write_rows
from tests.trainer.seq2seq.test_seq2seq import examples
from trainer.config import TrainConfig
from trainer.train import TrainResult, train


def encoder() -> LoadedModel:
    return replace(test_classification.loaded("bert"), tokenizer=word_tokenizer())


def encoder_decoder() -> LoadedModel:
    return replace(test_seq2seq.loaded("t5"), tokenizer=word_tokenizer())


def write_splits(folder: Path, rows: dict[str, list[object]]) -> TrainConfig:
    paths = {split: write_rows(folder / f"{split}.jsonl", some) for split, some in rows.items()}
    output = folder / "out" / "tiny.safetensors"
    return TrainConfig.model_validate({"name": "tiny", "output": output, "leaks": "drop"} | paths)


def labelled_rows(first: int, count: int) -> list[object]:
    return [{"text": row.texts[0], "label": row.label} for row in labelled(first, count)]


def run(config: TrainConfig, loaded: LoadedModel, **settings: object) -> TrainResult:
    return train(config.choosing(**settings), loaded=loaded)


def test_labelled_texts_make_a_head_on_an_encoder(tmp_path: Path) -> None:
    """No setting but the data: the rest is chosen, and said."""
    starts = {"train": (0, 160), "valid": (900, 40), "test": (2000, 40)}
    rows = {split: labelled_rows(*place) for split, place in starts.items()}
    config = write_splits(tmp_path, rows)
    result = run(config, encoder(), steps=60, rank=4)
    chosen = {choice.setting for choice in result.choices}
    assert {"labels", "positions", "learning_rate", "head.learning_rate"} <= chosen
    spec = read_adapter(config.output).spec
    assert spec.task.kind == "classification"
    assert spec.task.labels == ("early", "late")
    assert result.metrics["test_accuracy"] > 0.6
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["confusion"]["test"].keys() == {"early", "late"}
    assert document["epochs"][-1]["valid_metrics"].keys() == {"accuracy", "matthews"}

    uses = (AdapterUse(result.adapter.to("cpu")),)
    tests = result.datasets["test"].examples
    requests = [
        EncoderRequest(tuple(encode_pair(word_tokenizer(), *example.texts)[0]), uses)
        for example in tests
    ]
    said = torch.stack(HeadedEncoder(encoder()).logits(requests)).argmax(1).tolist()
    right = [spec.task.labels[number] == row.label for number, row in zip(said, tests, strict=True)]
    assert result.metrics["test_accuracy"] == pytest.approx(sum(right) / len(right))


def test_scored_pairs_make_a_regression(tmp_path: Path) -> None:
    rows = {
        split: [
            {"text": row.texts[0], "text_pair": row.texts[1], "label": row.label}
            for row in paired(first, count)
        ]
        for split, first, count in (("train", 0, 128), ("valid", 900, 40))
    }
    config = write_splits(tmp_path, rows)
    result = run(config, encoder(), steps=60, rank=4)
    assert result.adapter.spec.task.kind == "regression"
    assert result.metrics["valid_pearson"] == pytest.approx(
        result.fit.best.valid_metrics["pearson"], abs=1e-4
    )
    assert result.metrics["valid_pearson"] > 0.5


def test_instructions_train_an_encoder_decoder(tmp_path: Path) -> None:
    rows = {
        split: [
            {"instruction": row.question, "completion": row.completion}
            for row in examples(first, count)
        ]
        for split, first, count in (("train", 0, 96), ("valid", 900, 16))
    }
    config = write_splits(tmp_path, rows)
    result = run(config, encoder_decoder(), epochs=2, learning_rate=2e-2)
    assert config.choosing(epochs=2).positions != result.config.positions == "prompt"
    assert result.metrics["valid_loss"] < result.metrics["base_valid_loss"]
    template = result.adapter.spec.template
    assert template is not None
    sample = next(iter(result.evaluations["valid"].samples))
    asked = render_text(template, [{"role": "user", "content": sample.question}])
    request = EncoderRequest(
        tuple(encode_text(word_tokenizer(), asked)), (AdapterUse(result.adapter.to("cpu")),)
    )
    assert result.config.max_new_tokens is not None
    (answer,) = Seq2SeqGenerator(encoder_decoder()).generate(
        [request], result.config.max_new_tokens
    )
    assert word_tokenizer().decode(answer, skip_special_tokens=True) == sample.adapter


def test_an_encoder_learns_no_completions(tmp_path: Path) -> None:
    rows: list[object] = [{"instruction": "a b", "completion": "c"}] * 4
    config = write_splits(
        tmp_path, {"train": rows, "valid": [{"instruction": "d", "completion": "c"}]}
    )
    with pytest.raises(TrainingError, match="an encoder learns rows with a text and a label"):
        run(config, encoder(), steps=1)
    assert not config.output.exists()


def test_a_run_on_an_encoder_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had never been interrupted, for a head alone too, which keeps what it has read."""
    from tests.trainer.test_resume import _PowerCut, cut_after

    rows = {"train": labelled_rows(0, 64), "valid": labelled_rows(900, 16)}
    for method in ("loreft", "none"):
        folder = tmp_path / method
        folder.mkdir()
        config = write_splits(folder, rows)
        settings = {"method": method, "epochs": 3, "batch_size": 16, "checkpoint_steps": 1}
        whole = run(config, encoder(), **settings, output=folder / "whole" / "a.safetensors")
        with monkeypatch.context() as patch:
            cut_after(patch, 5)
            with pytest.raises(_PowerCut):
                run(config, encoder(), **settings)
        again = run(config, encoder(), **settings, resume=True)
        assert again.fit.epochs == whole.fit.epochs
        for name, tensor in whole.adapter.head.tensors().items():
            assert torch.equal(tensor, again.adapter.head.tensors()[name])
