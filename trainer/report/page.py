"""A report's document as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from reft_core.card import metric_rows
from trainer.evaluation.scoring import OTHER
from trainer.report.chart import Series, line_chart

MOST_SAMPLES = 20
"""Rows shown of each group of answers."""

_LOSS_UNITS = {
    "causal": "loss per completion token",
    "seq2seq": "loss per completion token",
    "encoder": "loss per row",
}
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "·"})


def render_page(document: Mapping[str, Any]) -> str:
    """The page. All text in ``document`` may be a stranger's: it is shown, never markup."""
    split = list(document["samples"])[-1]
    return _template().render(
        doc=document,
        split=split,
        metrics=metric_rows(document["metrics"]),
        charts=list(_charts(document)),
        matrices=[_matrix(split, counts) for split, counts in document["confusion"].items()],
        groups=_groups(document["samples"][split]),
        with_base=any(sample["base"] for sample in document["samples"][split]),
        settings=_settings(document),
        defaults=_defaults(document),
        best=document["epochs"][document["best_epoch"]],
        visible=lambda text: text.translate(_VISIBLE),
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("trainer.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


# -- charts ----------------------------------------------------------------------------------


def _charts(document: Mapping[str, Any]) -> list[tuple[str, list[Series], Markup]]:
    """Title, lines and drawing of each chart: of the losses, and of what else was validated."""
    epochs = document["epochs"]
    kept = epochs[document["best_epoch"]]["step"]
    valid = [(epoch["step"], epoch["valid_loss"]) for epoch in epochs]
    losses = [Series("validation", "valid", valid, dots=True)]
    if document["train_losses"]:
        losses.insert(0, Series("training", "train", document["train_losses"]))
    unit = _LOSS_UNITS[document["base"]["kind"]]
    found = [("Loss", losses, line_chart("Loss", unit, losses, kept))]
    names = list(epochs[-1]["valid_metrics"])
    lines = [
        Series(
            name,
            f"metric{place % 2}",
            [
                (epoch["step"], epoch["valid_metrics"][name])
                for epoch in epochs
                if name in epoch["valid_metrics"]
            ],
            dots=True,
        )
        for place, name in enumerate(names)
    ]
    if lines:
        title = "Metrics of the validation rows"
        found.append((title, lines, line_chart(title, "value", lines, kept)))
    return found


# -- confusion matrices ----------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One count, and its share of the row."""

    count: int
    share: float
    is_right: bool


@dataclass(frozen=True)
class Matrix:
    """Answers by right label: a row a label."""

    split: str
    columns: list[str]
    rows: list[tuple[str, list[Cell], float | None]]
    """Label, its cells, and the share of right answers; None for a label without rows."""


def _matrix(split: str, counts: Mapping[str, Mapping[str, int]]) -> Matrix:
    columns = [*counts, OTHER]
    if not any(row[OTHER] for row in counts.values()):
        columns.remove(OTHER)
    rows: list[tuple[str, list[Cell], float | None]] = []
    for label, row in counts.items():
        total = sum(row.values())
        cells = [Cell(row[got], row[got] / (total or 1), got == label) for got in columns]
        rows.append((label, cells, row[label] / total if total else None))
    return Matrix(split, columns, rows)


# -- answers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Some answers of a kind, and of how many."""

    title: str
    samples: Sequence[Mapping[str, Any]]
    num_all: int


def _groups(samples: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Wrong answers, then right ones; all together where rows have no score of their own."""
    if any(sample["adapter_score"] is None for sample in samples):
        parts = {"Answers": list(samples)}
    else:
        parts = {
            "Not right": [s for s in samples if s["adapter_score"] < 1],
            "Right": [s for s in samples if s["adapter_score"] >= 1],
        }
    return [Group(title, some[:MOST_SAMPLES], len(some)) for title, some in parts.items() if some]


# -- settings --------------------------------------------------------------------------------


def _settings(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and reason of every setting that was given or chosen."""
    config, choices = document["config"], document["choices"]
    given = [(name, _shown(config[name]), "given") for name in document["given"]]
    return given + [(name, choice["value"], choice["why"]) for name, choice in choices.items()]


def _defaults(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of the others."""
    said = {*document["given"], *document["choices"]}
    return [(n, _shown(value)) for n, value in document["config"].items() if n not in said]


def _shown(value: Any) -> str:
    """A setting's value, for people."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(inner)}" for name, inner in value.items())
    if value is None or value == "":
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)
