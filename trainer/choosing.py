"""Settings that are chosen for the user, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig


@dataclass(frozen=True)
class Choice:
    """One setting that was chosen for the user."""

    setting: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.value}: {self.reason}"


class Chooser:
    """Fills in what a config leaves open. Its choices are listed in order."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.choices: list[Choice] = []

    def choose(self, setting: str, value: object, reason: str, shown: object = None) -> None:
        """Take ``value`` for a setting unless it is given; ``shown`` is how people see it."""
        if setting in self.config.model_fields_set:
            return
        self.config = self.config.choosing(**{setting: value})
        self.choices.append(Choice(setting, value if shown is None else shown, reason))
