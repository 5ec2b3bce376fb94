"""Runs that are killed and taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reft_core.adapter import Adapter, read_adapter
from reft_core.errors import TrainingError
from tests.trainer.factories import byte_model, label_rows, make_config, write_rows
from trainer.checkpoints import last_checkpoint, read_checkpoint, write_checkpoint
from trainer.config import TrainConfig
from trainer.loop import ReftTrainer
from trainer.train import train

CHILD = """
import sys
import time
from pathlib import Path
from tests.trainer.factories import byte_model
from trainer.config import TrainConfig
from trainer.loop import ReftTrainer
from trainer.train import train
step = ReftTrainer.training_step
def slowly(*args, **kwargs):
    time.sleep(0.2)  # so that the kill comes before the end
    return step(*args, **kwargs)
ReftTrainer.training_step = slowly
train(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()), loaded=byte_model())
"""


def tensors(adapter: Adapter) -> torch.Tensor:
    return torch.cat([t.flatten() for e in adapter.edits.values() for _, t in e.parts()])


class _PowerCut(BaseException):
    """Ends a run as nothing in it expects."""


def cut_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let a run die in the step after this one."""
    original = ReftTrainer.training_step

    def training_step(self: ReftTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == steps:
            raise _PowerCut
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ReftTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("cut", "settings"),
    [
        (3, {}),  # in the first epoch
        (7, {"accumulate": 2, "eval_steps": 4}),
        (11, {"prefix_cache_mb": 0, "method": "direft", "positions": "f2+l1"}),
        (10, {"patience": 1}),  # at the end of an epoch
        (7, {"layers": (1,)}),  # with states of the layer below
    ],
)
def test_a_run_taken_up_again_gives_the_same_adapter(
    cut: int, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"epochs": 3, "checkpoint_steps": 1, **settings}
    whole = train(make_config(tmp_path, **shared), loaded=byte_model())
    again = make_config(tmp_path, output=tmp_path / "again/a.safetensors", **shared)
    with monkeypatch.context() as patch:
        cut_after(patch, cut)
        with pytest.raises(_PowerCut):
            train(again, loaded=byte_model())
    assert not again.output.exists()
    checkpoint = last_checkpoint(again.checkpoint_dir)
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{cut}"
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}

    resumed = train(again.choosing(resume=True), loaded=byte_model())
    assert torch.equal(tensors(resumed.adapter), tensors(whole.adapter))
    assert resumed.fit.epochs == whole.fit.epochs
    assert resumed.fit.num_steps == whole.fit.num_steps
    assert [c.setting for c in resumed.choices] == [c.setting for c in whole.choices]
    assert not again.checkpoint_dir.exists(), "a finished run leaves none"


def test_a_process_killed_in_the_midst_loses_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=3, checkpoint_steps=1)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(exclude_unset=True))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], cwd=Path.cwd())
    while child.poll() is None and (found := last_checkpoint(config.checkpoint_dir)) is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert found is not None
    assert not config.output.exists()
    resumed = train(config.choosing(resume=True), loaded=byte_model())
    assert any(str(config.checkpoint_dir) in remark for remark in resumed.remarks)
    whole = config.choosing(output=tmp_path / "whole/w.safetensors")
    train(whole, loaded=byte_model())
    assert torch.equal(tensors(read_adapter(whole.output)), tensors(resumed.adapter))


@pytest.fixture
def cut_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The config of a run that died after two steps."""
    config = make_config(tmp_path, epochs=1, checkpoint_steps=1)
    with monkeypatch.context() as patch:
        cut_after(patch, 2)
        with pytest.raises(_PowerCut):
            train(config, loaded=byte_model())
    return config


def test_another_run_does_not_go_on_from_it(cut_run: TrainConfig) -> None:
    other = cut_run.choosing(resume=True, learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"learning_rate: got 0.001, expected 0.02, as in"):
        train(other, loaded=byte_model())
    assert cut_run.train is not None
    write_rows(cut_run.train, label_rows(100, 40))
    with pytest.raises(TrainingError, match=r"train\.jsonl: has changed since .*checkpoint-2"):
        train(cut_run.choosing(resume=True), loaded=byte_model())


def test_without_resume_a_run_starts_again(cut_run: TrainConfig) -> None:
    result = train(cut_run, loaded=byte_model())
    assert result.fit.num_steps == 5
    assert any("starting again" in remark for remark in result.remarks)


def test_resuming_nothing_starts_at_the_beginning(tmp_path: Path) -> None:
    result = train(make_config(tmp_path, epochs=1, resume=True), loaded=byte_model())
    assert any("no checkpoint" in remark for remark in result.remarks)


def test_a_checkpoint_keeps_a_tree_exactly(tmp_path: Path) -> None:
    state = {"a": {0: torch.arange(3), 1: [torch.tensor(1.5), None, 0.1]}, "b": (True, "x")}
    write_checkpoint(tmp_path, 1, "{}", {"old": 1})
    write_checkpoint(tmp_path, 12, '{"global_step": 12}', state)
    found = last_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-12"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]
    read = read_checkpoint(found)
    assert torch.equal(read["a"][0], state["a"][0])
    assert read["a"][1][1:] == [None, 0.1]
    assert read["b"] == [True, "x"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, "{}", {"x": torch.ones(4)})
    file = tmp_path / "checkpoint-1/state.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(TrainingError, match="checkpoint-1: no checkpoint"):
        read_checkpoint(file.parent)
