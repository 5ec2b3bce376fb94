"""How a run is cut into steps, parts and processes, when it stops, and whom it tells."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reft_core.adapter import Adapter, read_adapter
from reft_core.errors import TrainingError
from tests.trainer.factories import byte_model, make_config, write_rows
from trainer import trackers
from trainer.config import TrainConfig
from trainer.order import in_order, num_steps, shuffled, spread, visits
from trainer.train import TrainResult, train

CHILD = """
import json
import sys
from pathlib import Path
from tests.trainer.factories import byte_model
from trainer.config import TrainConfig
from trainer.train import train
train(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()), loaded=byte_model())
"""


def run(folder: Path, name: str, **settings: Any) -> TrainResult:
    shared = {"epochs": 2, "output": folder / name / "a.safetensors"}
    return train(make_config(folder, **(shared | settings)), loaded=byte_model())


def tensors(adapter: Adapter) -> torch.Tensor:
    return torch.cat([t.flatten() for e in adapter.edits.values() for _, t in e.parts()])


def test_every_epoch_visits_every_row_once_in_another_order() -> None:
    order = list(islice(visits(shuffled(10, seed=3)), 30))
    epochs = [order[:10], order[10:20], order[20:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(islice(visits(shuffled(10, seed=3)), 30)) == order


def test_all_steps_are_whole() -> None:
    config = TrainConfig(data="x", epochs=3, batch_size=4)
    assert num_steps(config, 10) == 8  # of 7.5
    order = in_order(range(10), config)
    assert len(order) == 32
    assert sorted(order[:10]) == list(range(10))
    assert len(in_order(range(3), TrainConfig(data="x", steps=2, batch_size=4))) == 8


def test_rows_that_are_measured_come_from_all_over() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(3), 4) == range(3)


def test_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    """The rows' answers differ in length, so that means of parts would not be the mean."""
    rows = [
        {"instruction": f"no {n}", "completion": "yes" * (1 + n % 5) + str(n)} for n in range(40)
    ]
    shared = {"train": write_rows(tmp_path / "uneven.jsonl", rows), "learning_rate": 1e-2}
    whole = run(tmp_path, "whole", **shared)
    parts = run(tmp_path, "parts", accumulate=4, **shared)
    torch.testing.assert_close(tensors(parts.adapter), tensors(whole.adapter), atol=1e-4, rtol=1e-4)
    for one, other in zip(whole.fit.epochs[1:], parts.fit.epochs[1:], strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-4)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Five seconds: each process imports torch."""
    one = run(tmp_path, "one")
    config = make_config(tmp_path, epochs=2, output=tmp_path / "two/a.safetensors")
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(exclude_unset=True))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What accelerate launch --cpu sets.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    two = read_adapter(config.output)
    assert two.spec.training.metrics["valid_loss"] == pytest.approx(
        one.metrics["valid_loss"], abs=1e-4
    )
    torch.testing.assert_close(tensors(two), tensors(one.adapter), atol=1e-3, rtol=1e-3)


def test_a_step_must_divide_into_its_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate must divide batch_size, got 3 and 8"):
        make_config(tmp_path, accumulate=3)


def test_validation_every_few_steps_and_stopping_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([9.0, 5.0, 3.0, 4.0, 6.0, 1.0])
    monkeypatch.setattr("trainer.causal.mean_loss", lambda *_: next(losses, 0.5))
    found = run(tmp_path, "early", epochs=6, eval_steps=2, patience=2).fit
    assert [epoch.valid_loss for epoch in found.epochs] == [9.0, 5.0, 3.0, 4.0, 6.0]
    assert [epoch.step for epoch in found.epochs] == [0, 2, 4, 6, 8]
    assert found.best.step == 4
    assert found.num_steps == 8


def test_steps_win_over_epochs(tmp_path: Path) -> None:
    found = run(tmp_path, "steps", steps=7).fit
    assert found.num_steps == 7
    assert [epoch.step for epoch in found.epochs] == [0, 5, 7], "an epoch's, and the end's"


def test_autocast_keeps_the_edits_in_float32(tmp_path: Path) -> None:
    plain = run(tmp_path, "plain")
    cast = run(tmp_path, "cast", autocast=True)
    assert cast.fit.best.valid_loss == pytest.approx(plain.fit.best.valid_loss, rel=0.1)
    assert not torch.equal(tensors(cast.adapter), tensors(plain.adapter))


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    result = run(tmp_path, "told", report_to="tensorboard")
    events = EventAccumulator(str(result.config.report_dir / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 11))
    first_epoch = sum(event.value for event in losses[:5]) / 5
    assert first_epoch == pytest.approx(result.fit.epochs[1].train_loss, rel=1e-5)
    valid = events.Scalars("eval/loss")
    assert [event.step for event in valid] == [0, 5, 10]
    expected = [epoch.valid_loss for epoch in result.fit.epochs]
    assert [event.value for event in valid] == pytest.approx(expected, rel=1e-5)
    assert events.Scalars("train/learning_rate")[-1].value < 2e-2


class FakeTracker(ModuleType):
    """What transformers' callbacks and ours ask of wandb and of trackio, noted down."""

    class Config(dict[str, Any]):
        def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
            assert allow_val_change
            super().update(values)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__version__ = "1.0"
        self.config = self.Config()
        self.run: SimpleNamespace | None = None
        self.logged: list[dict[str, float]] = []
        self.begun: list[str] = []
        self.num_finished = 0
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))

    def init(self, *, project: str, name: str, **options: object) -> None:
        self.begun.append(name)
        self.run = SimpleNamespace(summary={}, id="1", name=name, _label=lambda code: None)

    def define_metric(self, name: str, **options: object) -> None:
        """Only wandb's."""

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.num_finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_the_curves_and_the_settings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    errors = ModuleType("config_util")
    errors.ConfigError = ValueError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    result = run(tmp_path, "told", report_to=name, model=str(tmp_path))
    assert fake.begun == [result.config.name]
    losses = [each["train/loss"] for each in fake.logged if "train/loss" in each]
    assert len(losses) == 10
    assert sum(losses[:5]) / 5 == pytest.approx(result.fit.epochs[1].train_loss, rel=1e-5)
    valid = [each for each in fake.logged if "eval/loss" in each]
    assert [each["train/global_step"] for each in valid] == [0, 5, 10]
    assert [each["eval/loss"] for each in valid] == [e.valid_loss for e in result.fit.epochs]
    assert fake.config["reft"]["rank"] == result.config.rank
    assert not {"output", "train"} & set(fake.config["reft"])
    assert str(tmp_path) not in json.dumps(fake.config["reft"])
    assert fake.num_finished == (name == "trackio")  # wandb ends with the process


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="report_to: got 'wandb', expected a package"):
        run(tmp_path, "told", report_to="wandb")


def test_a_seed_gives_the_same_adapter_bit_for_bit(tmp_path: Path) -> None:
    settings = {"positions": "f1+l1", "tied": False, "seed": 5}
    first, again = (run(tmp_path, name, **settings) for name in "ab")
    assert torch.equal(tensors(first.adapter), tensors(again.adapter))
    assert first.metrics == again.metrics
