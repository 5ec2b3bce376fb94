"""Sums a task's finished runs up in one small document: what the page is made of."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.quality.run import PROVENANCE, config_of
from benchmarks.quality.tasks import CAUSAL, NAMES, QualityTask
from benchmarks.spreads import spread
from trainer.compare.answers import Answers, References
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import CONTENDERS
from trainer.compare.table import over_seeds
from trainer.compare.task import Split, draw
from trainer.data import Dataset
from trainer.data.splits import load_splits
from trainer.evaluation.scoring import METRICS, Metric, Resampling, Statistic
from trainer.evaluation.scoring.sql import ExecutionAccuracy

Document = dict[str, Any]
REFERENCES = ("lora", "peft_lora")
"""Others' differences are from it."""

_PLACES = ("positions", "layers")
_FOLDERS = {"--data": "DATA", "--out": "OUT"}


def summarise(task: QualityTask, data: Path, out: Path) -> Document:
    """What is done of ``task``, what is not, and of what data, base and commands it comes."""
    folder = out / task.name
    rows = _TestRows.of(task, data, out)
    found: list[_Group] = []
    missing: list[dict[str, str]] = []
    for part, section in task.parts.items():
        for method in CompareConfig(**section).methods:
            group = _Group.read(folder, part, method, rows)
            if group is not None:
                found.append(group)
            else:
                missing.append({"part": part, "method": method})
    facts = _agreed(folder, sorted({group.part for group in found}))
    return {
        "task": task.name,
        "group": task.group,
        "model": NAMES[task.base],
        "metric": facts["metric"],
        "percent": rows.metric.percent,
        "lower_is_better": rows.metric.needs == "loss",
        "train_rows": facts["train_rows"],
        "valid_rows": facts["valid_rows"],
        "test_rows": len(rows.right),
        "of_test_rows": rows.available,
        "test_sha256": facts["test_sha256"],
        "prompt": dict(task.config.get("template", {})),
        "labels": len(rows.labels),
        "most_frequent": rows.most_frequent if rows.labels else None,
        "results": [group.summary(rows, _reference(found)) for group in found],
        "not_run": missing,
        "provenance": {
            part: [without_folders(each) for each in _json(folder / part / PROVENANCE)]
            for part in sorted({group.part for group in found})
        },
    }


_AGREED = ("metric", "train_sha256", "train_rows", "valid_sha256", "valid_rows", "test_rows")


def _agreed(folder: Path, parts: Sequence[str]) -> Document:
    """What all parts were run on, which must be the same."""
    found = [_json(folder / part / "task.json") for part in parts]
    shared = [{name: facts[name] for name in _AGREED} for facts in found]
    hashes = [_json(folder / part / "test.json") for part in parts]
    for facts, test in zip(shared, hashes, strict=True):
        assert (facts, test) == (shared[0], hashes[0]), f"{folder}: parts of other rows"
    return {**shared[0], **hashes[0]}


@dataclass(frozen=True)
class _TestRows:
    """The test rows' right answers, and how answers to them are judged."""

    metric: Metric
    also: Sequence[Metric]
    right: Sequence[References]
    labels: tuple[str, ...]
    available: int
    """Rows of the split, of which those may be drawn."""

    @property
    def most_frequent(self) -> float:
        """Share of the rows whose right answer is the one that most have."""
        ((_, count),) = Counter(self.right).most_common(1)
        return round(count / len(self.right), 4)

    @cached_property
    def resampling(self) -> Resampling:
        return Resampling.of(len(self.right), seed=0)

    @classmethod
    def of(cls, task: QualityTask, data: Path, out: Path) -> _TestRows:
        config = config_of(task, data, out)
        facts = next(_json(path) for path in sorted((out / task.name).glob("*/task.json")))
        test = load_splits(config).datasets["test"]
        drawn = draw(test, facts["test_rows"])
        return cls(
            METRICS[facts["metric"]],
            [_metric(name, data / task.folder) for name in task.also],
            _right_answers(task, drawn),
            tuple(facts["config"]["labels"] or ()),
            len(test.examples),
        )

    def statistic(self, metric: Metric, records: Sequence[Mapping[str, Any]]) -> Statistic:
        each = [
            metric.statistic(Answers.from_json(record["answers"]).against(self.right), self.labels)
            for record in records
        ]
        return over_seeds(each)


def _metric(name: str, folder: Path) -> Metric:
    """The metric of that name; queries are run on the database in the data's ``folder``."""
    metric = METRICS[name]
    if isinstance(metric, ExecutionAccuracy):
        (database,) = folder.glob("*.sqlite")
        return replace(metric, database=database)
    return metric


def _right_answers(task: QualityTask, test: Dataset) -> list[References]:
    if task.base == CAUSAL:
        return Split(test, ()).references
    return [(str(example.label),) for example in test.examples]


class _Group:
    """The tested runs of one method in one part, and the search that chose their setting."""

    def __init__(
        self,
        part: str,
        method: str,
        section: CompareConfig,
        finals: list[dict[str, Any]],
        searched: list[dict[str, Any]],
    ) -> None:
        self.part = part
        self.method = method
        self.section = section
        self.finals = finals
        self.searched = searched
        self.shared: dict[str, Any] = {}
        self.statistic: Statistic | None = None

    @classmethod
    def read(cls, folder: Path, part: str, method: str, rows: _TestRows) -> _Group | None:
        results = folder / part / "results"
        finals = [r for r in _records(results / "final" / method) if r["status"] == "done"]
        if not finals:
            return None
        assert len({json.dumps(r["setting"]) for r in finals}) == 1, f"{results}: two settings"
        section = CompareConfig(**_section(folder / part))
        group = cls(part, method, section, finals, _records(results / "search" / method))
        group.shared = _json(folder / part / "task.json")["config"]
        group.statistic = rows.statistic(rows.metric, finals)
        return group

    def summary(self, rows: _TestRows, reference: _Group | None) -> Document:
        assert self.statistic is not None
        first = self.finals[0]
        runs = [*self.searched, *self.finals]
        seconds = [r["training_cpu_seconds"] for r in runs if "training_cpu_seconds" in r]
        other = reference.statistic if reference is not None and reference is not self else None
        name = rows.metric.name
        return {
            "part": self.part,
            "method": self.method,
            "label": CONTENDERS[self.method].label,
            "setting": self._setting() | first["setting"],
            "searched": [
                {"setting": r["setting"], "valid": r.get("valid"), "error": r.get("error")}
                for r in self.searched
            ],
            "seeds": [record["seed"] for record in self.finals],
            "by_seed": [round(record["test"][name], 4) for record in self.finals],
            "quality": _rounded(asdict(rows.resampling.estimate(self.statistic))),
            "also": {
                metric.name: _rounded(
                    asdict(rows.resampling.estimate(rows.statistic(metric, self.finals)))
                )
                for metric in rows.also
            },
            "difference": _rounded(asdict(rows.resampling.difference(self.statistic, other)))
            if other
            else None,
            "parameters": first["num_trainable"],
            "steps": first.get("num_steps", 0),
            "training_cpu_seconds": spread(seconds or [0.0], 1),
            "file_bytes": first["file_bytes"],
        }

    def _setting(self) -> dict[str, Any]:
        """What the section gives the method, and where one that edits chosen tokens does so."""
        given = dict(_flat(self.section.settings.get(self.method, {})))
        contender = CONTENDERS[self.method]
        if contender.kind != "registry" or contender.every_token:
            return given
        return given | {name: self.shared[name] for name in _PLACES if name not in given}


def _flat(settings: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names, as searches write them: ``head.pooling``."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", value


def without_folders(provenance: Mapping[str, Any]) -> Document:
    """The same facts with a command that holds on any machine."""
    words = shlex.split(provenance["command"])
    for place, word in enumerate(words[:-1]):
        if word in _FOLDERS:
            words[place + 1] = _FOLDERS[word]
    return {**provenance, "command": " ".join(words)}


def _reference(groups: Sequence[_Group]) -> _Group | None:
    return next((group for group in groups if group.method in REFERENCES), None)


def _section(folder: Path) -> dict[str, Any]:
    """What of a part's ``compare`` section its results depend on."""
    return {"settings": _json(folder / "task.json")["settings"]}


def _records(folder: Path) -> list[dict[str, Any]]:
    """The runs of one method, failed ones too, in order of their seeds."""
    found = [_json(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: int(record["seed"]))


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in numbers.items()}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
