"""Where a study is kept: a journal in the sweep's folder, or a database told by its URL."""

from __future__ import annotations

import shlex

from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from reft_core.errors import TrainingError, explain
from trainer.sweep.config import SweepConfig


def storage_of(sweep: SweepConfig) -> JournalStorage | RDBStorage:
    """The sweep's storage, made if it is new. Raises :class:`TrainingError`."""
    if sweep.storage is not None:
        try:
            return RDBStorage(sweep.storage)
        except Exception as error:  # whatever the database's driver raises, or its absence
            told = shown_url(sweep.storage)
            reason = f"{type(error).__name__}: {error}".replace(sweep.storage, told)
            allowed = f"a database's URL that can be opened ({reason})"
            raise TrainingError(explain("storage", told, allowed), field="storage") from None
    sweep.out.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(sweep.out / "study.journal")))


def shown_url(url: str) -> str:
    """A database's URL for people: no password, and no options, which may hold one."""
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):  # a port that is no number
        return "no URL"


def without_password(command: str, url: str | None) -> str:
    """The shell's ``command`` with its database's URL, if any, as :func:`shown_url` tells it."""
    if not url or url not in " ".join(words := shlex.split(command)):
        return command
    return shlex.join(word.replace(url, shown_url(url)) for word in words)
