"""Whole runs on a tiny random llama over bytes."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from reft_core.adapter import check_fits, read_adapter
from reft_core.errors import AdapterError, TrainingError
from tests.reference.slow import reference_logits
from tests.trainer.factories import byte_model, label_rows, make_config, write_rows
from trainer import fit as fit_module
from trainer import outcome
from trainer.causal import CausalTask
from trainer.collate import Collator
from trainer.config import TrainConfig
from trainer.data import load_dataset, tokenise
from trainer.export import check_finite
from trainer.fit import fit
from trainer.outcome import Epoch, FitResult, check_learnt
from trainer.progress import SilentProgress
from trainer.reft_model import ReftModel
from trainer.task import Measured
from trainer.train import TrainResult, train


def run(config: TrainConfig) -> TrainResult:
    return train(config, loaded=byte_model(), command="reft train tiny.yaml")


def test_a_labeller_learns_and_its_file_and_report_say_how(tmp_path: Path) -> None:
    named = {"subspaces": {"tone": "0:4", "topic": [4, 5]}}
    labelling = {"labels": ("y", "n"), "positions": "prompt", "rank": 8, "epochs": 12}
    config = make_config(tmp_path, **labelling, **named)
    result = run(config)

    losses = [epoch.valid_loss for epoch in result.fit.epochs]
    assert len(losses) == 13
    assert result.fit.best.valid_loss == min(losses[1:]) < 0.3 * losses[0]

    adapter = read_adapter(config.output)
    assert adapter.digest == result.adapter.digest
    spec = adapter.spec
    check_fits(spec, byte_model().description)
    assert spec.positions.rule == "prompt"
    assert spec.sites["block_output"].layers == (0, 1, 2)
    assert spec.task.labels == ("y", "n")
    assert spec.subspaces == {"tone": (0, 1, 2, 3), "topic": (4, 5)}
    assert spec.training.command == "reft train tiny.yaml"
    assert spec.training.seed == 0
    assert spec.training.data["train_rows"] == 40
    assert spec.training.data["test_sha256"] == load_dataset(tmp_path / "test.jsonl").sha256
    assert spec.training.hyperparameters["learning_rate"] == 2e-2
    assert spec.training.hyperparameters["best_epoch"] == result.fit.best.number
    metrics = spec.training.metrics
    assert metrics["valid_loss"] == result.fit.best.valid_loss
    assert metrics["test_exact_match"] > 0.8
    assert metrics["test_base_exact_match"] == 0
    assert metrics["label_choice"] > 0.8
    assert metrics["base_label_choice"] == 0.5

    for name in ("report.html", "model_card.md"):
        told = (tmp_path / "out" / name).read_text()
        assert adapter.digest in told
        assert "reft train tiny.yaml" in told
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["metrics"] == metrics
    assert len(document["samples"]["test"]) == 6
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tiny.safetensors",
        "report.html",
        "report.json",
        "model_card.md",
    }


@pytest.mark.parametrize(
    ("positions", "tied", "method"),
    [("l1", True, "loreft"), ("f2+l1", False, "direft"), ("prompt", True, "direft_orthonormal")],
)
def test_the_file_reproduces_the_trained_models_logits(
    tmp_path: Path, positions: str, tied: bool, method: str
) -> None:
    config = make_config(tmp_path, positions=positions, tied=tied, method=method, epochs=1)
    loaded = byte_model()
    model = CausalTask(config, loaded, {}).new_model()
    collator = Collator(config.rule)
    rows = tokenise(load_dataset(config.train), loaded.tokenizer, config.rule, max_length=128)
    untrained = model(**collator(rows[:4]))["logits"]
    fit(model, rows, rows[:8], config, collator, SilentProgress())
    trained = model(**collator(rows[:4]))["logits"]
    result = run(config)

    stored = CausalTask(config, byte_model(), {}).new_model()
    edits = iter(result.adapter.edits.values())
    for module in stored.interventions:
        edit = next(edits)
        module.forward = edit.delta  # type: ignore[method-assign]
    reloaded = stored(**collator(rows[:4]))["logits"]
    assert (trained - untrained).abs().max() > 0.1
    # The run above validated on other rows, but with one epoch there is only one to keep.
    torch.testing.assert_close(reloaded, trained, atol=1e-4, rtol=1e-4)


def test_a_seed_reproduces_a_run_and_another_does_not(tmp_path: Path) -> None:
    found = [run(make_config(tmp_path, seed=seed, epochs=1)) for seed in (1, 1, 2)]
    first, again, other = (
        torch.cat([t.flatten() for edit in r.adapter.edits.values() for _, t in edit.parts()])
        for r in found
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_best_epoch_is_kept_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, epochs=3)
    loaded = byte_model()
    model = CausalTask(config, loaded, {}).new_model()
    snapshots = []
    scripted = iter([9.0, 5.0, 1.0, 3.0])  # untrained, then the epochs

    def mean_loss(model: ReftModel, *_: object) -> float:
        snapshots.append([p.clone() for p in model.trainable()])
        return next(scripted)

    monkeypatch.setattr(fit_module, "mean_loss", mean_loss)
    rows = tokenise(load_dataset(config.train), loaded.tokenizer, config.rule, max_length=128)
    result = fit(model, rows, rows, config, Collator(config.rule), SilentProgress())
    assert result.best.number == 2
    assert all(map(torch.equal, model.trainable(), snapshots[2]))
    assert not all(map(torch.equal, model.trainable(), snapshots[3]))


def test_divergence_ends_the_run_and_leaves_the_old_file(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.output.parent.mkdir()
    config.output.write_bytes(b"the one before")
    loaded = byte_model()
    loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss became nan at step 1; .*learning_rate"):
        train(config, loaded=loaded)
    assert config.output.read_bytes() == b"the one before"
    assert [path.name for path in config.output.parent.iterdir()] == ["tiny.safetensors"]


def test_a_finite_divergence_ends_the_run_and_leaves_the_old_file(tmp_path: Path) -> None:
    config = make_config(tmp_path, learning_rate=1e3, epochs=2)
    config.output.parent.mkdir()
    config.output.write_bytes(b"the one before")
    message = r"the validation loss was .* never lower .* training loss ended .*nothing was written"
    with pytest.raises(TrainingError, match=message) as caught:
        train(config, loaded=byte_model())
    assert caught.value.field == "learning_rate"
    assert config.output.read_bytes() == b"the one before"


def test_an_adapter_that_is_no_better_than_the_base_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 2.5, 2.25])  # before training, and after each epoch

    def measure(task: CausalTask, model: ReftModel, rows: object) -> Measured:
        return Measured(next(losses, 2.5))

    monkeypatch.setattr(CausalTask, "measure", measure)
    monkeypatch.setattr(outcome, "_HARM", 100)
    config = make_config(tmp_path, epochs=2)
    result = train(config, loaded=byte_model())
    assert result.warning is not None
    assert "was 2 before training and never lower after it (at best 2.25, at step 10)" in (
        result.warning
    )
    assert config.output.is_file()
    assert html.escape(result.warning) in (config.report_dir / "report.html").read_text()
    assert json.loads((config.report_dir / "report.json").read_text())["warning"] == result.warning


@pytest.mark.parametrize(("score", "warned"), [(0.5, True), (0.6, False)])
def test_a_better_score_is_no_reason_to_warn(score: float, warned: bool) -> None:
    epochs = tuple(
        Epoch(number, 0.1, loss, number, {"accuracy": found})
        for number, loss, found in ((0, 1.0, 0.5), (1, 1.2, score))
    )
    assert (check_learnt(FitResult(epochs, epochs[1], 1, 0.0, 0.0)) is not None) == warned


def test_tensors_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    model = CausalTask(make_config(tmp_path, layers=(1,)), byte_model(), {}).new_model()
    check_finite(model.to_edits())
    with torch.no_grad():
        model.interventions[0].bias.fill_(float("inf"))
    with pytest.raises(TrainingError, match="bias of layer 1, block_output ended with NaN"):
        check_finite(model.to_edits())


def test_a_bfloat16_base_trains_edits_in_float32(tmp_path: Path) -> None:
    loaded = byte_model()
    loaded.model.to(torch.bfloat16)
    result = train(make_config(tmp_path, epochs=2), loaded=loaded)
    losses = [epoch.valid_loss for epoch in result.fit.epochs]
    assert losses[-1] < losses[0]
    assert result.adapter.spec.dtype == "float32"
    tensor = next(iter(result.adapter.edits.values())).down
    assert tensor is not None
    assert not torch.equal(tensor, tensor.bfloat16().float()), "not rounded to the base's dtype"


def test_bad_data_is_refused_before_a_base_is_loaded(tmp_path: Path) -> None:
    config = make_config(tmp_path, model="no/such-model")
    write_rows(tmp_path / "test.jsonl", label_rows(39, 2))
    with pytest.raises(TrainingError, match=r"test\.jsonl:1: the same prompt .*train\.jsonl:40"):
        train(config)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rank": 33}, "rank: got 33, expected 1 to 32"),
        ({"layers": (3,)}, "layers: got 3"),
        ({"max_length": 10}, "expected at most 10"),
        ({"output": "/dev/null/x.safetensors"}, "output: got '/dev/null/x.safetensors'"),
        ({"output": "/"}, "output: got '/', expected a file"),
    ],
)
def test_a_setting_the_base_cannot_satisfy_is_named(
    tmp_path: Path, fields: dict[str, object], problem: str
) -> None:
    with pytest.raises((TrainingError, AdapterError), match=problem):
        run(make_config(tmp_path, **fields))
    assert not (tmp_path / "out").exists()


def served_loss(config: TrainConfig, result: TrainResult) -> float:
    """Mean loss over the test rows' completions, by the slow reference on the adapter file."""
    assert config.test is not None
    loaded, losses = byte_model(), []
    rows = tokenise(load_dataset(config.test), loaded.tokenizer, config.rule, max_length=64)
    for row in rows:
        tokens = [*row.prompt, *row.completion]
        logits = reference_logits(loaded.model, tokens, len(row.prompt), result.adapter)
        predicted = logits[len(row.prompt) - 1 : -1]
        losses += F.cross_entropy(
            predicted, torch.tensor(row.completion), reduction="none"
        ).tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("prefix_tuning", {"prefix_length": 5}),
        ("prefix_tuning", {"prefix_length": 5, "prefix_bottleneck": 16}),
        ("prompt_tuning", {"prefix_length": 6}),
        ("mam", {"prefix_length": 3, "rank": 4, "positions": "prompt"}),
    ],
)
def test_virtual_tokens_train_and_are_served_as_trained(
    tmp_path: Path, method: str, settings: dict
) -> None:
    shared = {"method": method, "labels": ("y", "n"), "epochs": 4, "rank": 4}
    config = make_config(tmp_path, **(shared | settings))
    result = run(config)
    spec = read_adapter(config.output).spec
    assert spec.method == method
    assert spec.prefix is not None
    assert spec.prefix.length == settings["prefix_length"]
    assert bool(spec.sites) == (method == "mam")
    losses = [epoch.valid_loss for epoch in result.fit.epochs]
    assert result.fit.best.valid_loss == min(losses[1:]) < losses[0]
    # The file holds what was trained: it gives the same loss when it is read back.
    assert result.metrics["test_loss"] == pytest.approx(served_loss(config, result), abs=1e-4)
