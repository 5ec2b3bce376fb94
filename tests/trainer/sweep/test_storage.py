"""A study in a database, or in a folder's file."""

from __future__ import annotations

import shlex

import pytest

from reft_core.errors import TrainingError
from trainer.sweep.config import SweepConfig
from trainer.sweep.storage import storage_of, without_password


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nodb://me:secret@host/d", "nodb://me:***@host/d"),
        ("nodb://host/d?user=me&password=secret", "nodb://host/d"),
        ("me:secret@host", "no URL"),
    ],
)
def test_a_database_that_cannot_be_opened_is_told_without_its_password(url: str, told: str) -> None:
    with pytest.raises(TrainingError, match="storage: got ") as caught:
        storage_of(SweepConfig(storage=url))
    assert told in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("flag", ["--storage ", "--storage="])
def test_a_command_is_kept_without_the_password(flag: str) -> None:
    url = "nodb://me:secret@host/d"
    command = f"reft sweep a.yaml {flag}{url} --space 'rank=[1, 2]'"
    told = shlex.split(without_password(command, url))
    assert told == shlex.split(command.replace("secret", "***"))
    assert without_password(command, None) == command
    assert without_password(command, "nodb://another") == command
