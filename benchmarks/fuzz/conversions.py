"""Damaged adapters of other libraries through the converters: refused or converted, never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz.mutants import damage_bytes, damage_json
from reft_core.convert import BASE_TEMPLATE, ConvertOptions, base_from_folder, convert
from reft_core.errors import ReftError
from reft_core.sites import ModelDescription

GOOD = Path(__file__).parents[2] / "tests" / "fixtures"
"""Adapters as the libraries themselves saved them."""

_KINDS = {"peft": "peft", "pyreft": "pyreft", "adapterhub": "adapters", "easysteer": "easysteer"}
_LONGEST_REFUSAL = 2000


@dataclass
class Report:
    """What became of the folders."""

    files: int = 0
    converted: Counter[str] = field(default_factory=Counter)
    """How many were converted after all, by kind."""
    problems: list[str] = field(default_factory=list)


class _Malice:
    """Pickled, it makes a folder; a reader that does what it says gives itself away."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


def attack(*, seed: int, count: int) -> Report:
    """So many damaged folders, over all kinds of source."""
    report = Report()
    cases = [
        (kind, case)
        for library, kind in _KINDS.items()
        for case in sorted((GOOD / library).iterdir())
        if (case / "adapter").is_dir() and not (case / "base").is_dir()
    ]
    with tempfile.TemporaryDirectory(prefix="reft-fuzz-") as made:
        canary = Path(made, "ran")
        for index in range(count):
            draw = random.Random(f"{seed}:{index}")
            kind, case = draw.choice(cases)
            folder = Path(shutil.copytree(case / "adapter", Path(made, "adapter")))
            for path in draw.sample(sorted(folder.iterdir()), 1):
                _damage(draw, path, canary)
            name = f"{seed}:{index} {case.parent.name}/{case.name}"
            report.files += 1
            try:
                convert(folder, kind, _options(draw, case))
                report.converted[kind] += 1
            except ReftError as refusal:
                if len(refusal.message) > _LONGEST_REFUSAL:
                    report.problems.append(f"{name}: endless, {refusal.message:.150}")
            except Exception as error:
                report.problems.append(f"{name}: {type(error).__name__}: {error!s:.300}")
            if canary.exists():
                report.problems.append(f"{name}: did what a pickle said")
                canary.rmdir()
            shutil.rmtree(folder)
    return report


@cache
def _base() -> ModelDescription:
    return base_from_folder(str(GOOD / "base"), "tiny-fixture")


def _options(draw: random.Random, case: Path) -> ConvertOptions:
    """Options that fit the case, or most of it."""
    facts = json.loads((case / "case.json").read_text())
    given = {key: facts.get(key) for key in ("positions", "method", "tied") if draw.random() < 0.9}
    if draw.random() < 0.5:
        given["activation"] = facts.get("activation") or "identity"
    return ConvertOptions(base=_base(), name="fuzzed", template=BASE_TEMPLATE, **given)


def _damage(draw: random.Random, path: Path, canary: Path) -> None:
    """Change one file of a folder, by its form or by its bytes."""
    if path.suffix == ".json" and draw.random() < 0.8:
        document = json.loads(path.read_text())
        damage_json(draw, document)
        path.write_text(json.dumps(document))
    elif path.suffix in (".bin", ".pt") and draw.random() < 0.7:
        path.write_bytes(_pickle(draw, path, canary))
    else:
        path.write_bytes(damage_bytes(draw, path.read_bytes()))


def _pickle(draw: random.Random, path: Path, canary: Path) -> bytes:
    """A pickle of other things than it should hold, some of which would run."""
    if draw.random() < 0.2:
        return pickle.dumps({"weight": _Malice(canary)}, protocol=2)
    state = torch.load(path, weights_only=True)
    if isinstance(state, dict) and state:
        key = draw.choice(list(state))
        state[key] = draw.choice(
            [None, 3, "x", [1], torch.zeros(3), torch.zeros(0), torch.full((4, 24), float("nan")),
             torch.zeros(4, 24, dtype=torch.int8), torch.zeros(24, 4).to_sparse(),
             torch.zeros(24, 4, device="meta"), torch.zeros(1).expand(24, 4),
             torch.zeros(24, 4, dtype=torch.complex64), state[key], _Malice(canary)]
        )  # fmt: skip
    held = io.BytesIO()
    torch.save(draw.choice([state, state, state, [], None, {1: 2}]), held)
    return held.getvalue()
