"""A sweep: trials in this process or several, until the study has as many as asked for."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import optuna

from reft_core.errors import ReftError, TrainingError, explain
from reft_core.loading import LoadedModel
from trainer.compare.task import Task, load_task, run_config
from trainer.config import TrainConfig
from trainer.sweep.config import SweepConfig
from trainer.sweep.study import existing_study, num_begun, open_study, taking_part
from trainer.sweep.trial import Pruned, run_trial

OnTrial = Callable[[optuna.trial.FrozenTrial], None]


def sweep(
    config: TrainConfig,
    settings: SweepConfig,
    *,
    loaded: LoadedModel | None = None,
    on_trial: OnTrial = lambda trial: None,
) -> optuna.Study:
    """Run the trials that are missing and return the study.

    With several workers each loads its own base; ``loaded`` and ``on_trial`` are this process's
    only. Ends early at the timeout. Raises :class:`TrainingError` when the data or the settings
    cannot be used, before any trial.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shared = without_test(config)
    stop = None if settings.timeout is None else time.time() + settings.timeout
    with taking_part(settings):
        if settings.workers > 1:
            _spawn(shared, settings, stop)
        else:
            task = _load(shared, settings, loaded)
            study = open_study(settings, facts_of(task, settings))
            _work(task, settings, study, stop, on_trial)
    found = existing_study(settings)
    assert found is not None, "a worker makes the study before its first trial"
    return found


def without_test(config: TrainConfig) -> TrainConfig:
    """``config`` that knows of no test rows, so that nothing can be chosen by them."""
    return run_config(config, {"test": None})


def facts_of(task: Task, settings: SweepConfig) -> dict[str, Any]:
    """All that every trial depends on, as JSON values."""
    return task.facts | {
        "objective": settings.objective,
        "num_layers": task.loaded.description.num_layers,
    }


def _load(config: TrainConfig, settings: SweepConfig, loaded: LoadedModel | None = None) -> Task:
    assert config.test is None, "a sweep has no test rows"
    task = load_task(
        config,
        loaded=loaded,
        train_rows=settings.train_rows,
        valid_rows=settings.valid_rows,
        steps=settings.steps,
    )
    if settings.objective == "accuracy" and not task.config.labels:
        raise TrainingError(explain("objective", "accuracy", "'loss', or labels in the config"))
    return task


def _work(
    task: Task,
    settings: SweepConfig,
    study: optuna.Study,
    stop: float | None,
    on_trial: OnTrial = lambda trial: None,
) -> None:
    """Run trials until the study has enough or the time is over."""

    def objective(trial: optuna.Trial) -> float:
        try:
            return run_trial(task, settings.space, settings.objective, trial)
        except Pruned as error:
            raise optuna.TrialPruned(str(error)) from None
        except TrainingError as error:
            trial.set_user_attr("error", error.message)
            raise

    while num_begun(study) < settings.trials and (stop is None or time.time() < stop):
        study.optimize(
            objective,
            n_trials=1,
            catch=(TrainingError,),
            callbacks=[lambda _, trial: on_trial(trial)],
        )


def _spawn(config: TrainConfig, settings: SweepConfig, stop: float | None) -> None:
    """Run the workers to their end. They are stopped when this process is interrupted."""
    given = {name: getattr(config, name) for name in config.model_fields_set}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    workers = [
        context.Process(
            target=_worker, args=(given, settings.model_dump_json(), index, stop), daemon=True
        )
        for index in range(settings.workers)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()
    if any(worker.exitcode for worker in workers):
        codes = [worker.exitcode for worker in workers]
        raise TrainingError(f"sweep: workers ended with {codes}; their messages are above")


def _worker(given: dict[str, Any], settings_json: str, index: int, stop: float | None) -> None:
    """One process of several. Its base is loaded once."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = SweepConfig.model_validate_json(settings_json)
    try:
        task = _load(TrainConfig.model_validate(given), settings)
        study = open_study(settings, facts_of(task, settings), worker=index)
    except ReftError as error:
        print(f"error: worker {index}: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None
    _work(task, settings, study, stop)


def to_json(study: optuna.Study) -> list[dict[str, Any]]:
    """The trials as JSON values, in order."""
    return [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "params": trial.params,
            "valid_losses": {str(k): abs(v) for k, v in trial.intermediate_values.items()},
            **json.loads(json.dumps(trial.user_attrs)),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
