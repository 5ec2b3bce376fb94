"""Sums a task's finished runs up in one small document: what the page is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.run import BASE_PART, config_of
from benchmarks.quality.tasks import CAUSAL, NAMES, QualityTask
from benchmarks.spreads import spread
from trainer.compare.answers import Answers
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import CONTENDERS
from trainer.compare.table import over_seeds
from trainer.compare.task import draw
from trainer.data.examples import Example
from trainer.data.splits import load_splits
from trainer.evaluation.scoring import METRICS, Answered, Metric, Resampling, Statistic, value_of

Document = dict[str, Any]
REFERENCES = ("lora", "peft_lora")
"""Others' differences are from it."""

_PLACES = ("positions", "layers")


def summarise(task: QualityTask, data: Path, out: Path) -> Document:
    """What is done of ``task``, what is not, and of what data, base and commands it comes."""
    folder = out / task.name
    rows = _References.of(task, data, out)
    found: list[_Group] = []
    missing: list[dict[str, str]] = []
    for part, section in task.parts.items():
        for method in CompareConfig(**section).methods:
            group = _Group.read(folder, part, method, rows)
            if group is not None:
                found.append(group)
            else:
                missing.append({"part": part, "method": method})
    about = {part: _json(folder / part / "provenance.json") for part in (BASE_PART, *task.parts)}
    facts = next(_json(path) for path in sorted(folder.glob("*/task.json")))
    return {
        "task": task.name,
        "group": task.group,
        "model": NAMES[task.base],
        "metric": facts["metric"],
        "percent": rows.metric.percent,
        "train_rows": facts["train_rows"],
        "valid_rows": facts["valid_rows"],
        "test_rows": len(rows.answered),
        "of_test_rows": rows.available,
        "test_sha256": _json(next(iter(sorted(folder.glob("*/test.json")))))["test_sha256"],
        "prompt": dict(task.config.get("template", {})),
        "labels": len(rows.labels),
        "results": [group.summary(rows, _reference(found)) for group in found],
        "base_without_end": _base_without_end(folder / BASE_PART / "answers.json", rows),
        "not_run": missing,
        "provenance": {part: each for part, each in about.items() if each},
    }


class _References:
    """The test rows' right answers, and how answers to them are judged."""

    def __init__(
        self,
        metric: Metric,
        answered: Sequence[str],
        labels: Sequence[str],
        available: int,
    ) -> None:
        self.metric = metric
        self.answered = list(answered)
        self.labels = tuple(labels)
        self.available = available
        self.resampling = Resampling.of(len(self.answered), seed=0)

    @classmethod
    def of(cls, task: QualityTask, data: Path, out: Path) -> _References:
        config = config_of(task, data, out)
        section = CompareConfig(**next(iter(task.parts.values())))
        facts = next(_json(path) for path in sorted((out / task.name).glob("*/task.json")))
        test = load_splits(config).datasets["test"]
        drawn = draw(test, section.test_rows)
        return cls(
            METRICS[facts["metric"]],
            [_right_answer(task, example) for example in drawn.examples],
            facts["config"]["labels"] or (),
            len(test.examples),
        )

    def rows(self, answers: Answers) -> list[Answered]:
        return answers.against(self.answered)

    def statistic(self, records: Sequence[Mapping[str, Any]]) -> Statistic:
        each = [
            self.metric.statistic(self.rows(Answers.from_json(record["answers"])), self.labels)
            for record in records
        ]
        return over_seeds(each)


def _right_answer(task: QualityTask, example: Example) -> str:
    return example.completion if task.base == CAUSAL else str(example.label)


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
    def read(cls, folder: Path, part: str, method: str, rows: _References) -> _Group | None:
        results = folder / part / "results"
        finals = _records(results / "final" / method)
        if not finals:
            return None
        section = CompareConfig(**_section(folder / part))
        group = cls(part, method, section, finals, _records(results / "search" / method))
        group.shared = _json(folder / part / "task.json")["config"]
        group.statistic = rows.statistic(finals)
        return group

    def summary(self, rows: _References, reference: _Group | None) -> Document:
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
            "difference": _rounded(asdict(rows.resampling.difference(self.statistic, other)))
            if other
            else None,
            "parameters": first["num_trainable"],
            "training_cpu_seconds": spread(seconds or [0.0], 1),
            "file_bytes": first["file_bytes"],
            "serving": first["serving"]["scope"],
            "serving_extra_percent": round(
                fmean(r["serving"]["extra_percent"] for r in self.finals), 4
            ),
        }

    def _setting(self) -> dict[str, Any]:
        """What the section gives the method, and where one that edits chosen tokens does so."""
        given = dict(self.section.settings.get(self.method, {}))
        contender = CONTENDERS[self.method]
        if contender.kind != "registry" or contender.every_token:
            return given
        return given | {name: self.shared[name] for name in _PLACES if name not in given}


def _reference(groups: Sequence[_Group]) -> _Group | None:
    return next((group for group in groups if group.method in REFERENCES), None)


def _base_without_end(path: Path, rows: _References) -> Document | None:
    """The base's share of right labels where an answer need not end."""
    if not path.exists():
        return None
    found = _json(path)
    assert found["test"]["references"] == rows.answered, f"{path}: of other test rows"
    answered = rows.rows(Answers(choices=tuple(found["test"]["choices"])))
    valid = Answers(choices=tuple(found["valid"]["choices"])).against(found["valid"]["references"])
    statistic = rows.metric.statistic(answered, rows.labels)
    return {
        "quality": _rounded(asdict(rows.resampling.estimate(statistic))),
        "valid": round(value_of(rows.metric, valid, rows.labels), 4),
    }


def _section(folder: Path) -> dict[str, Any]:
    """What of a part's ``compare`` section its results depend on."""
    return {"settings": _json(folder / "task.json")["settings"]}


def _records(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of one method, in order of their seeds."""
    found = [_json(path) for path in sorted(folder.glob("*.json"))]
    done = [record for record in found if record["status"] == "done"]
    return sorted(done, key=lambda record: int(record["seed"]))


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in numbers.items()}


def _json(path: Path) -> dict[str, Any]:
    """The document at ``path``; an empty one where there is none."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
