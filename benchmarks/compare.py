"""Runs workloads on all peers in turn, and keeps what each took.

Within a repeat every peer runs the same prompts once, so a machine that slows down slows all of
them, and ratios are taken within a repeat. Models are loaded and every shape has been run
before anything counts. A peer with several variants or settings runs each a few times first; the
fastest is what the repeats compare. Where all of them are slow, their first runs decide.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.peers.contenders import Variant, wait_loaded
from benchmarks.peers.protocol import PeerMissing, Worker
from benchmarks.workloads import Workload

_RUN_S = 600.0
_SETTLE_S = 0.3
"""Before each run, so that the threads of the one before have stopped spinning."""
_SLOW_S = 20.0
_SLOW_REPEATS = 2
"""Repeats of a peer whose runs all take longer than ``_SLOW_S``."""


@dataclass
class Loaded:
    """A variant whose worker has its model."""

    variant: Variant
    worker: Worker
    about: dict[str, Any]


@dataclass
class Measured:
    """One peer on one workload."""

    option: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    """Of the last run."""
    tried: dict[str, float] = field(default_factory=dict)
    """Median seconds of each option that was tried."""


@dataclass
class Outcome:
    """Everything measured in one dtype."""

    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)
    """By workload and peer."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a variant was not measured, or only in part."""
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each variant said of itself, versions at least."""


def load_all(started: Sequence[tuple[Variant, Worker]], outcome: Outcome) -> list[Loaded]:
    """Those workers that loaded their model; the others are closed and noted as missing."""
    loaded = []
    for variant, worker in started:
        try:
            about = wait_loaded(worker)
        except PeerMissing as error:
            outcome.missing[variant.name] = str(error)
            worker.close()
            continue
        about.pop("ok")
        outcome.about[variant.name] = about
        loaded.append(Loaded(variant, worker, about))
    return loaded


def run_workload(
    workload: Workload,
    prompts: Sequence[Sequence[int]],
    entrants: list[Loaded],
    outcome: Outcome,
    *,
    repeats: int,
    trials: int,
) -> None:
    """Measure a workload on ``entrants`` and add it to ``outcome``.

    An entrant that fails is noted as missing and leaves the list. With ``trials`` = 0 the
    first option of each variant is taken as it is.
    """
    options: dict[str, list[_Option]] = {}
    for entrant in list(entrants):
        settings = entrant.variant.options(workload.name)
        for setting in settings if trials else settings[:1]:
            option = _Option(entrant, setting, workload, prompts)
            if not _attempt(option, entrants, outcome):  # warms up
                break
            option.warm_up_s = option.seconds.pop()
            options.setdefault(entrant.variant.peer, []).append(option)
    rivals = [choices for choices in options.values() if len(choices) > 1]
    for _ in range(trials):
        for choices in rivals:
            all_slow = all(option.is_slow for option in choices)
            for option in choices:
                if all_slow:
                    option.seconds.append(option.warm_up_s)
                else:
                    _attempt(option, entrants, outcome)
    chosen: dict[str, _Option] = {}
    tried: dict[str, dict[str, float]] = {}
    for peer, choices in options.items():
        alive = [option for option in choices if option.entrant in entrants]
        timed = [option for option in alive if option.seconds]
        tried[peer] = {o.label: median(o.seconds) for o in timed}
        if alive:
            chosen[peer] = min(timed, key=lambda o: median(o.seconds), default=alive[0])
            chosen[peer].seconds = []
    for repeat in range(repeats):
        for option in chosen.values():
            if repeat < _SLOW_REPEATS or not option.is_slow:
                _attempt(option, entrants, outcome)
    outcome.measured[workload.name] = {
        peer: Measured(option.label, option.seconds, option.tokens, tried[peer])
        for peer, option in chosen.items()
        if option.entrant in entrants
    }


@dataclass
class _Option:
    """A loaded variant with settings for one workload."""

    entrant: Loaded
    settings: dict[str, Any]
    workload: Workload
    prompts: Sequence[Sequence[int]]
    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    warm_up_s: float = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether every run so far, the first included, took long."""
        return min([self.warm_up_s, *self.seconds]) > _SLOW_S

    @property
    def label(self) -> str:
        parts = [self.entrant.variant.label] if self.entrant.variant.label else []
        parts += [f"{name}={value}" for name, value in self.settings.items()]
        return " ".join(parts) or "default"

    def run(self) -> None:
        """Time one run, and see that it answered in full."""
        time.sleep(_SETTLE_S)
        answer = self.entrant.worker.ask(
            "run",
            _RUN_S,
            prompts=self.prompts,
            output_tokens=self.workload.output_tokens,
            settings=self.settings,
        )
        tokens = answer["tokens"]
        if [len(t) for t in tokens] != [self.workload.output_tokens] * len(self.prompts):
            raise PeerMissing(f"not every answer has {self.workload.output_tokens} tokens")
        self.seconds.append(answer["seconds"])
        self.tokens = tokens


def _attempt(option: _Option, entrants: list[Loaded], outcome: Outcome) -> bool:
    """Run an option; if it fails, take its entrant out of the race."""
    entrant = option.entrant
    if entrant not in entrants:
        return False
    try:
        option.run()
    except PeerMissing as error:
        outcome.missing[entrant.variant.name] = f"workload {option.workload.name}: {error}"
        entrants.remove(entrant)
        return False
    return True
