"""A sweep: trials in this process or several, until the study has as many as asked for."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from reft_core.errors import ReftError, TrainingError, explain
from reft_core.loading import LoadedModel
from trainer.compare.arena import Arena, arena_for
from trainer.compare.task import load_task, run_config
from trainer.config import TrainConfig
from trainer.sweep.config import SweepConfig
from trainer.sweep.study import ended, existing_study, next_trial, open_study, taking_part
from trainer.sweep.trial import Pruned, run_trial

_FOLLOW_S = 1.0
"""Between looks at what the workers have done."""

OnTrial = Callable[[optuna.trial.FrozenTrial], None]


def sweep(
    config: TrainConfig,
    settings: SweepConfig,
    *,
    loaded: LoadedModel | None = None,
    on_trial: OnTrial = lambda trial: None,
) -> optuna.Study:
    """Run the trials that are missing and return the study.

    With several workers each loads its own base, and ``loaded`` is not used. Ends early at
    the timeout. Raises :class:`TrainingError` when the data or the settings cannot be used,
    before any trial.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shared = without_test(config)
    stop = None if settings.timeout is None else time.time() + settings.timeout
    with taking_part(settings):
        if settings.workers > 1:
            _spawn(shared, settings, stop, on_trial)
        else:
            arena = _load(shared, settings, loaded)
            study = open_study(settings, facts_of(arena, settings))
            _work(arena, settings, study, stop, on_trial)
    found = existing_study(settings)
    assert found is not None, "a worker makes the study before its first trial"
    return found


def without_test(config: TrainConfig) -> TrainConfig:
    """``config`` that knows of no test rows, so that nothing can be chosen by them."""
    return run_config(config, {"test": None})


def facts_of(arena: Arena, settings: SweepConfig) -> dict[str, Any]:
    """All that every trial depends on, as JSON values."""
    space = settings.space.model_dump(mode="json")
    return {
        **arena.task.facts,
        **{f"space.{name}": options for name, options in space.items()},
        "objective": settings.objective,
        "num_layers": arena.task.loaded.description.num_layers,
    }


def _load(config: TrainConfig, settings: SweepConfig, loaded: LoadedModel | None = None) -> Arena:
    assert config.test is None, "a sweep has no test rows"
    task = load_task(
        config,
        loaded=loaded,
        train_rows=settings.train_rows,
        valid_rows=settings.valid_rows,
        steps=settings.steps,
    )
    arena = arena_for(task)
    if settings.objective == "accuracy" and (task.kind == "seq2seq" or not arena.labels):
        raise TrainingError(explain("objective", "accuracy", "'loss', or labels in the config"))
    return arena


def _work(
    arena: Arena,
    settings: SweepConfig,
    study: optuna.Study,
    stop: float | None,
    on_trial: OnTrial = lambda trial: None,
) -> None:
    """Run trials until the study has enough or the time is over."""
    while stop is None or time.time() < stop:
        trial = next_trial(study, settings)
        if trial is None:
            return
        try:
            value = run_trial(arena, settings.space, settings.objective, trial)
        except Pruned:
            finished = study.tell(trial, state=TrialState.PRUNED)
        except BaseException as error:
            trial.set_user_attr("error", getattr(error, "message", repr(error)))
            finished = study.tell(trial, state=TrialState.FAIL)
            if not isinstance(error, TrainingError):
                raise
        else:
            finished = study.tell(trial, value)
        on_trial(finished)


def _spawn(
    config: TrainConfig, settings: SweepConfig, stop: float | None, on_trial: OnTrial
) -> None:
    """Run the workers to their end. They are stopped when this process is interrupted."""
    given = {name: getattr(config, name) for name in config.model_fields_set}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    workers = [
        context.Process(
            target=_worker, args=(given, settings.model_dump_json(), index, stop), daemon=True
        )
        for index in range(settings.workers)
    ]
    known = existing_study(settings)
    told = set() if known is None else {trial.number for trial in ended(known)}
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            wait([worker.sentinel for worker in workers if worker.is_alive()], _FOLLOW_S)
            study = existing_study(settings)
            for trial in [] if study is None else ended(study):
                if trial.number not in told:
                    told.add(trial.number)
                    on_trial(trial)
    finally:
        for worker in workers:
            worker.terminate()
    if any(worker.exitcode for worker in workers):
        codes = [worker.exitcode for worker in workers]
        raise TrainingError(f"sweep: workers ended with {codes}; their messages are above")


def _worker(given: dict[str, Any], settings_json: str, index: int, stop: float | None) -> None:
    """One process of several. Its base is loaded once, and it takes its share of the threads."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = SweepConfig.model_validate_json(settings_json)
    try:
        arena = _load(TrainConfig.model_validate(given), settings)
        study = open_study(settings, facts_of(arena, settings), worker=index)
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.workers))
        _work(arena, settings, study, stop)
    except ReftError as error:
        print(f"error: worker {index}: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # of all processes at once; the first one says so
        raise SystemExit(1) from None


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
