"""The study behind a sweep: where its trials are kept, and what draws and prunes them."""

from __future__ import annotations

import fcntl
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from reft_core.errors import TrainingError, explain
from trainer.sweep.config import SweepConfig
from trainer.sweep.storage import storage_of

FACTS = "task"
"""User attribute of a study: what all of its trials depend on."""
_FOLDER = "folder"
"""User attribute of a trial: the id of the folder it was begun in, which is kept in its lock."""
_LOCK = "study.lock"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def open_study(sweep: SweepConfig, facts: Mapping[str, Any], *, worker: int = 0) -> optuna.Study:
    """The study of this name in the sweep's storage, made if it is new.

    ``worker`` makes processes on one storage draw differently. Raises :class:`TrainingError`
    naming what differs if the study's trials are of another task.
    """
    study = optuna.create_study(
        study_name=sweep.name,
        storage=storage_of(sweep),
        sampler=optuna.samplers.TPESampler(
            seed=sweep.seed + worker,
            n_startup_trials=sweep.startup_trials,
            multivariate=False,
            constant_liar=sweep.workers > 1,
        ),
        pruner=_pruner(sweep),
        direction="minimize" if sweep.objective == "loss" else "maximize",
        load_if_exists=True,
    )
    _check_same(study, facts)
    return study


def existing_study(sweep: SweepConfig) -> optuna.Study | None:
    """The study of this name in the sweep's storage, if there is one."""
    storage = storage_of(sweep)
    if sweep.name not in optuna.get_all_study_names(storage):
        return None
    return optuna.load_study(study_name=sweep.name, storage=storage)


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that are over, however they ended."""
    trials: list[FrozenTrial] = study.get_trials(deepcopy=False, states=ENDED)
    return trials


def next_trial(study: optuna.Study, sweep: SweepConfig) -> optuna.Trial | None:
    """A trial to run; None once as many as the study is to have are over or under way.

    Processes on one folder ask one after the other, so that they begin no more.
    """
    with (sweep.out / "ask.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begun = study.get_trials(deepcopy=False, states=(*ENDED, TrialState.RUNNING))
        if len(begun) >= sweep.trials:
            return None
        trial = study.ask()
        trial.set_user_attr(_FOLDER, (sweep.out / _LOCK).read_text())
        return trial


@contextmanager
def taking_part(sweep: SweepConfig) -> Iterator[None]:
    """Held while this sweep runs on its folder; others may run on it too.

    The first to come knows that no trial of this folder can be under way, and marks those whose
    process died as failed. Of other folders on the same database it knows nothing.
    """
    sweep.out.mkdir(parents=True, exist_ok=True)
    with (sweep.out / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            lock.seek(0)
            folder = lock.read()
            if not folder:
                lock.write(uuid.uuid4().hex)
                lock.flush()
            _forget_unfinished(existing_study(sweep), folder if sweep.storage else None)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _forget_unfinished(study: optuna.Study | None, folder: str | None) -> None:
    """Mark trials that are under way as failed: those begun in ``folder``, None: in any."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if study else []
    for trial in trials:
        assert study is not None
        if folder is None or trial.user_attrs.get(_FOLDER) == folder:
            study.tell(trial.number, state=TrialState.FAIL)


def _pruner(sweep: SweepConfig) -> optuna.pruners.BasePruner:
    if sweep.pruner == "none":
        return optuna.pruners.NopPruner()
    if sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1)
    return optuna.pruners.MedianPruner(n_startup_trials=sweep.startup_trials, n_warmup_steps=1)


def _check_same(study: optuna.Study, facts: Mapping[str, Any]) -> None:
    known = study.user_attrs.get(FACTS)
    asked = json.loads(json.dumps(facts))
    if known is None:
        study.set_user_attr(FACTS, asked)
        return
    for key in sorted(known.keys() | asked.keys()):
        if known.get(key) != asked.get(key):
            allowed = f"{known.get(key)!r} as the study's trials have, or another out or name"
            raise TrainingError(explain(key, asked.get(key), allowed), field=key)
