"""The runs that a comparison consists of."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.compare.config import CompareConfig
from trainer.compare.contenders import Contender, Setting
from trainer.compare.store import Job


def search_settings(contender: Contender, comparison: CompareConfig) -> list[Setting]:
    """What a search tries of a method, without what the config has settled."""
    settled = comparison.settings.get(contender.name, {})
    if isinstance(rates := settled.get("learning_rate"), list):
        return [{"learning_rate": rate} for rate in rates]
    found: list[Setting] = []
    for setting in contender.settings(comparison.search):
        left = {name: value for name, value in setting.items() if name not in settled}
        if left not in found:
            found.append(left)
    return found


def search_jobs(contenders: Iterable[Contender], comparison: CompareConfig) -> list[Job]:
    """Every search's trials, with the first seed."""
    return [
        Job.of("search", contender.name, setting, comparison.seeds[0])
        for contender in contenders
        for setting in _choices(contender, comparison)
    ]


def _choices(contender: Contender, comparison: CompareConfig) -> list[Setting]:
    """Those of a search; none where there is no choice."""
    settings = search_settings(contender, comparison)
    return settings if len(settings) > 1 else []


def tested_seeds(name: str, comparison: CompareConfig) -> tuple[int, ...]:
    """Zero-shot draws nothing, so that one seed is all of them."""
    return comparison.seeds[:1] if name == "zero_shot" else comparison.seeds
