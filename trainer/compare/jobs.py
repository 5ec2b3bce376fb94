"""The runs that a comparison consists of."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.compare.config import CompareConfig
from trainer.compare.contenders import Contender, Setting
from trainer.compare.settings import given_choices, given_values
from trainer.compare.store import Job
from trainer.compare.task import Task


def search_settings(task: Task, contender: Contender, comparison: CompareConfig) -> list[Setting]:
    """What a search tries of a method, without what the config has settled."""
    choices = given_choices(task, contender, comparison)
    settled = given_values(task, contender, comparison)
    return contender.settings(comparison.search, choices, settled)


def search_jobs(
    task: Task, contenders: Iterable[Contender], comparison: CompareConfig
) -> list[Job]:
    """Every search's trials, with the first seed; none where there is no choice."""
    searches = {c.name: search_settings(task, c, comparison) for c in contenders}
    return [
        Job.of("search", name, setting, comparison.seeds[0])
        for name, settings in searches.items()
        for setting in settings
        if len(settings) > 1
    ]


def tested_seeds(name: str, comparison: CompareConfig) -> tuple[int, ...]:
    """Zero-shot draws nothing, so that one seed is all of them."""
    return comparison.seeds[:1] if name == "zero_shot" else comparison.seeds
