"""Whole sweeps on a tiny random llama over bytes."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState

from reft_core.errors import TrainingError
from tests.trainer.compare.test_encoder import encoder
from tests.trainer.compare.test_encoder import make_config as encoder_config
from tests.trainer.factories import byte_model, label_rows, make_config, write_rows
from trainer.config import TrainConfig
from trainer.config.file import load_config
from trainer.sweep import run, trial
from trainer.sweep.config import SweepConfig
from trainer.sweep.report import best_settings, best_trial, param_importances, write_report
from trainer.sweep.run import sweep
from trainer.sweep.study import existing_study, next_trial, open_study, taking_part

SPACE = {"first": [0, 1], "last": [1, 2], "layers": ["all", "upper_half"], "rank": [1, 2]}


def settings(folder: Path, **fields: object) -> SweepConfig:
    values = {"space": SPACE, "trials": 3, "startup_trials": 2, "out": folder / "swept"}
    return SweepConfig.model_validate(values | fields)


def tiny(folder: Path, **fields: object) -> TrainConfig:
    return make_config(folder, **({"labels": ("y", "n"), "epochs": 2} | fields))


def test_a_sweep_goes_on_where_it_ended_and_reports_the_best(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    seen: list[int] = []
    study = sweep(
        config, settings(tmp_path), loaded=byte_model(), on_trial=lambda t: seen.append(t.number)
    )
    assert seen == [0, 1, 2]
    study = sweep(
        config,
        settings(tmp_path, trials=5),
        loaded=byte_model(),
        on_trial=lambda t: seen.append(t.number),
    )
    assert seen == [0, 1, 2, 3, 4]
    best = best_trial(study)
    assert best is not None
    done = study.get_trials(states=(TrialState.COMPLETE,))
    assert best.value == min(trial.value for trial in done)  # type: ignore[type-var]

    found = write_report(study, config, settings(tmp_path), "reft sweep tiny.yaml")
    folder = tmp_path / "swept"
    again = load_config(folder / "best.yaml")
    assert again.test == config.test
    assert again.positions == found["positions"]
    assert again.rank == found["rank"]
    assert again.learning_rate == pytest.approx(best.params["learning_rate"])
    report = (folder / "report.md").read_text()
    assert f"trial {best.number}" in report
    document = json.loads((folder / "report.json").read_text())
    assert len(document["trials"]) == 5
    assert document["best"]["number"] == best.number


@pytest.mark.parametrize("method", ["loreft", "lora", "series_adapter"])
def test_the_best_config_trains_what_the_trial_trained(tmp_path: Path, method: str) -> None:
    from trainer.train import train

    config = tiny(tmp_path)
    space = SPACE | {"method": ["direft", method] if method == "loreft" else method}
    given = settings(tmp_path, pruner="none", space=space, trials=2)
    study = sweep(config, given, loaded=byte_model())
    write_report(study, config, given, "")
    best = best_trial(study)
    result = train(load_config(tmp_path / "swept" / "best.yaml"), loaded=byte_model())
    assert best is not None
    assert result.fit.best.valid_loss == best.value
    sites, positions = best.user_attrs["settings"].get("sites"), best_settings(best)["positions"]
    assert (method == "lora") == (sites is not None)
    assert (method == "loreft") == (positions != "prompt")


def test_the_test_split_is_never_read(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    (tmp_path / "test.jsonl").write_text("this would be an error\n")
    study = sweep(config, settings(tmp_path, trials=1), loaded=byte_model())
    assert study.user_attrs["task"]["config"].get("test") is None
    assert study.trials[0].state == TrialState.COMPLETE


def test_workers_share_a_study_and_begin_no_trial_too_many(tmp_path: Path) -> None:
    """Real processes, each with a base of its own from the disk."""
    base = byte_model()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    config = tiny(tmp_path, epochs=1, model=str(tmp_path / "base"))
    space = {**SPACE, "learning_rate": {"low": 0.001, "high": 0.01}}
    seen: list[int] = []
    study = sweep(
        config,
        settings(tmp_path, workers=2, trials=3, pruner="none", space=space),
        on_trial=lambda trial: seen.append(trial.number),
    )
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert sorted(seen) == [0, 1, 2]
    rates = {trial.params["learning_rate"] for trial in study.trials}
    assert len(rates) == 3, "workers draw differently"


def test_a_worker_says_why_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tiny(tmp_path, model=str(tmp_path / "none"), test=None).given()
    with pytest.raises(SystemExit, match="1"):
        run._worker(given, settings(tmp_path, workers=2).model_dump_json(), 1, None)
    assert "error: worker 1: model: got" in capsys.readouterr().err


def test_an_encoder_can_be_swept(tmp_path: Path) -> None:
    space = {"positions": ["prompt", "f2"], "rank": [2, 4], "layers": "all", "tied": True}
    given = {"space": space, "objective": "accuracy", "trials": 3}
    config = encoder_config(tmp_path)
    study = sweep(config, settings(tmp_path, **given), loaded=encoder())
    assert all(trial.state != TrialState.FAIL for trial in study.trials)
    best = best_trial(study)
    assert best is not None
    assert best.value > 0.5
    assert best_settings(best)["positions"] in space["positions"]


def test_accuracy_can_be_the_objective(tmp_path: Path) -> None:
    given = {"objective": "accuracy", "trials": 2}
    study = sweep(tiny(tmp_path), settings(tmp_path, **given), loaded=byte_model())
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert all(0 <= trial.value <= 1 for trial in study.trials)
    assert best_trial(study).value == max(trial.value for trial in study.trials)
    with pytest.raises(TrainingError, match="objective: got 'accuracy', expected 'loss'"):
        sweep(make_config(tmp_path, labels=None), settings(tmp_path, **given), loaded=byte_model())


def test_a_trial_that_does_badly_is_given_up(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=4)
    space = SPACE | {"learning_rate": [2e-2, 1e-7], "rank": 2, "layers": "all"}
    given = {"space": space, "startup_trials": 1, "seed": 3, "trials": 5}
    study = sweep(config, settings(tmp_path, **given), loaded=byte_model())
    pruned = study.get_trials(states=(TrialState.PRUNED,))
    assert pruned
    assert all(len(trial.intermediate_values) < 4 for trial in pruned)
    best = best_trial(study)
    assert best is not None
    assert best.params["learning_rate"] == 2e-2


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_each_pruner_gives_up_what_is_ever_worse_or_nothing(tmp_path: Path, pruner: str) -> None:
    study = open_study(settings(tmp_path, pruner=pruner), {})
    lengths = []
    for number in range(12):
        begun = study.ask()
        for epoch in range(1, 10):
            begun.report(float(number), epoch)
            if begun.should_prune():
                study.tell(begun, state=TrialState.PRUNED)
                break
        else:
            study.tell(begun, float(number))
        lengths.append(epoch)
    assert lengths[0] == 9, "there is nothing to be worse than"
    assert (min(lengths) < 9) == (pruner != "none")


def test_a_setting_the_base_cannot_take_fails_its_trial_alone(tmp_path: Path) -> None:
    space = {"rank": [2, 33], "first": 0, "last": 1, "layers": "all", "learning_rate": 1e-2}
    given = {"space": space | {"tied": True}, "trials": 6, "seed": 1}
    study = sweep(tiny(tmp_path, epochs=1), settings(tmp_path, **given), loaded=byte_model())
    states = {trial.params["rank"]: trial.state for trial in study.trials}
    assert states == {2: TrialState.COMPLETE, 33: TrialState.FAIL}
    failed = next(trial for trial in study.trials if trial.state == TrialState.FAIL)
    assert "rank: got 33" in failed.user_attrs["error"]


def test_a_trial_without_memory_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trial, "fit_on", full)
    study = sweep(tiny(tmp_path, epochs=1), settings(tmp_path, trials=2), loaded=byte_model())
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert "out of memory" in study.trials[0].user_attrs["error"]


def test_a_study_of_other_rows_is_not_gone_on_with(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=1)
    sweep(config, settings(tmp_path, trials=1), loaded=byte_model())
    write_rows(tmp_path / "train.jsonl", label_rows(0, 24))
    with pytest.raises(TrainingError, match="train_rows: got 24, expected 40 as the study's"):
        sweep(config, settings(tmp_path, trials=2), loaded=byte_model())


@pytest.mark.parametrize(
    "space", [{"rank": [1, 2, 4]}, {"rank": 2}, {"learning_rate": {"low": 1e-3, "high": 1e-2}}]
)
def test_a_study_of_another_space_is_not_gone_on_with(tmp_path: Path, space: dict) -> None:
    config = tiny(tmp_path, epochs=1)
    sweep(config, settings(tmp_path, trials=1), loaded=byte_model())
    (name,) = space
    with pytest.raises(TrainingError, match=f"space.{name}: got .*, expected .* as the study's"):
        sweep(config, settings(tmp_path, trials=2, space=SPACE | space), loaded=byte_model())


def test_trials_of_a_process_that_died_are_not_waited_for(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=1)
    sweep(config, settings(tmp_path, trials=1), loaded=byte_model())
    dead = existing_study(settings(tmp_path))
    assert dead is not None
    dead.ask()
    study = sweep(config, settings(tmp_path, trials=3), loaded=byte_model())
    assert [trial.state for trial in study.trials] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]


def test_trials_under_way_in_another_folder_are_left_to_it(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=1)
    database = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "trials": 3}
    here, there = (settings(tmp_path, out=tmp_path / name, **database) for name in ("a", "b"))
    sweep(config, here.model_copy(update={"trials": 1}), loaded=byte_model())
    study = existing_study(here)
    assert study is not None
    for begun in (here, there):
        with taking_part(begun):
            assert next_trial(study, begun) is not None
    complete, failed, running = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING
    with taking_part(here):
        assert [trial.state for trial in study.trials] == [complete, failed, running]
        assert next_trial(study, here) is None, "three of three are over or under way"
    with taking_part(there):
        assert [trial.state for trial in study.trials] == [complete, failed, failed]


def test_no_trial_begins_after_the_timeout(tmp_path: Path) -> None:
    study = sweep(tiny(tmp_path), settings(tmp_path, timeout=1e-9), loaded=byte_model())
    assert study.trials == []


def test_importances_tell_what_matters(tmp_path: Path) -> None:
    study = open_study(settings(tmp_path), {})
    distributions = {
        "learning_rate": optuna.distributions.FloatDistribution(1e-3, 1e-2),
        "rank": optuna.distributions.IntDistribution(1, 8),
    }
    for index in range(40):
        params = {"learning_rate": 1e-3 + 2e-4 * index, "rank": 1 + index * 5 % 8}
        value = (params["learning_rate"] - 4e-3) ** 2
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=value)
        )
    found = param_importances(study)
    assert found["learning_rate"] > 2 * found["rank"]
    assert sum(found.values()) == pytest.approx(1)


def test_settings_of_a_trial_are_what_it_drew(tmp_path: Path) -> None:
    study = sweep(tiny(tmp_path, epochs=1), settings(tmp_path, trials=1), loaded=byte_model())
    (trial,) = study.trials
    found = best_settings(trial)
    assert found["rank"] == trial.params["rank"]
    assert found["positions"].endswith(f"l{trial.params['last']}")
