"""What the figures say of LoReFT beside LoRA: no more than their intervals do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, Literal

from benchmarks.quality.minute import smallest

Document = Mapping[str, Any]
Outcome = Literal["ahead", "level", "behind"]


@dataclass(frozen=True)
class Verdict:
    """The LoReFT of fewest parameters in one task, beside LoRA."""

    document: Document
    reft: Document
    lora: Document
    untrained: Document | None
    """The base's answers; None for an encoder."""
    head: Document | None

    @property
    def name(self) -> str:
        """Of the task."""
        name: str = self.document["task"]
        return name

    @property
    def outcome(self) -> Outcome:
        """Where the whole interval of the difference lies."""
        low, high = self.reft["difference"]["low"], self.reft["difference"]["high"]
        if low <= 0 <= high:
            return "level"
        return "ahead" if (low > 0) != self.document["lower_is_better"] else "behind"


def verdict(document: Document) -> Verdict | None:
    """What there is to say of one task; None while one of the two has no figure."""
    results = document["results"]
    loras = [r for r in results if r["method"] in ("lora", "peft_lora")]
    if not loras or not _only(results, "loreft"):
        return None
    untrained, head = (_only(results, name) for name in ("zero_shot", "head_only"))
    return Verdict(document, smallest(document), loras[0], untrained, head)


def _only(results: Sequence[Document], method: str) -> Document | None:
    return next((result for result in results if result["method"] == method), None)


def advice(documents: Sequence[Document]) -> list[str]:
    """Which of the settings that were measured to take, a sentence each."""
    documents = [document for document in documents if document["group"] != "domains"]
    return [*_sizes(documents), *_methods(documents), *_rates(documents)]


def _sizes(documents: Sequence[Document]) -> list[str]:
    """The smallest LoReFT against the largest, where a task has both."""
    pairs = []
    for document in documents:
        refts = [r for r in document["results"] if r["method"] == "loreft"]
        if len(refts) > 1:
            refts.sort(key=lambda result: int(result["parameters"]))
            pairs.append((document, refts[0], refts[-1]))
    lines = []
    for document, small, large in pairs:
        gain = _points(document, large["quality"]["value"] - small["quality"]["value"])
        lines.append(f"{document['task']} {gain}")
    if not lines:
        return []
    small, large = pairs[0][1], pairs[0][2]
    return [
        f"**Size.** LoReFT of {large['parameters']:,} parameters instead of "
        f"{small['parameters']:,} changes the mean over seeds by: {', '.join(lines)}."
    ]


def _methods(documents: Sequence[Document]) -> list[str]:
    """DiReFT against LoReFT of the same size."""
    lines = []
    for document in documents:
        direft = _only(document["results"], "direft")
        same = [
            r
            for r in document["results"]
            if direft and r["method"] == "loreft" and r["parameters"] == direft["parameters"]
        ]
        if direft and same:
            gain = direft["quality"]["value"] - same[0]["quality"]["value"]
            lines.append(f"{document['task']} {_points(document, gain)}")
    text = f"**DiReFT** instead of LoReFT of the same size: {', '.join(lines)}."
    return [text] if lines else []


def _rates(documents: Sequence[Document]) -> list[str]:
    """Learning rates that validation chose, by method."""
    chosen: dict[str, list[float]] = {}
    for document in documents:
        for result in document["results"]:
            if result["searched"] and "learning_rate" in result["setting"]:
                key = f"{result['label']} ({document['model']})"
                chosen.setdefault(key, []).append(result["setting"]["learning_rate"])
    return [
        f"**Learning rate** of {label}: validation chose "
        f"{', '.join(f'{rate:g}' for rate in sorted(rates))} (geometric mean "
        f"{geometric_mean(rates):.2g})."
        for label, rates in chosen.items()
    ]


def _points(document: Document, value: float) -> str:
    return f"{100 * value:+.1f}" if document["percent"] else f"{value:+.3f}"
