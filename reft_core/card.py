"""A model card: an adapter told in Markdown, with the front matter that hubs read.

It says what is in the adapter's file and nothing else, so every figure in it was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCardData

from reft_core.adapter import Adapter
from reft_core.loading import DEMO_MODEL, DEMO_NAME
from reft_core.spec import AdapterSpec

CARD = "model_card.md"
"""Beside an adapter's file; a hub has it as README.md."""
PAGE = "report.html"
"""The report of its training, beside it."""
LIBRARY = "reft-serve"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LICENCES = frozenset({
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "gpl-2.0", "gpl-3.0",
    "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "odc-by", "odbl", "unlicense", "wtfpl", "zlib",
})  # fmt: skip
"""Identifiers that hubs know; another licence is given by name."""
_TASKS = {
    "generation": "text-generation",
    "classification": "text-classification",
    "regression": "text-classification",
}
_SPLITS = {"test": "test", "valid": "validation"}
_LOSSES = ("loss", "perplexity")
_MAX_CELL = 160


def repository(spec: AdapterSpec) -> str:
    """What a card that is on no hub calls the adapter's repository."""
    return f"OWNER/{spec.name}"


def model_card(adapter: Adapter, repo: str | None = None, base_model: str | None = None) -> str:
    """The card of ``adapter`` in the hub's repository ``repo``.

    ``base_model`` is the base's id on that hub, where the adapter names it otherwise; without a
    form that an id has, the card links to none.
    """
    spec = adapter.spec
    sections = [
        f"---\n{_front_matter(spec, base_model)}\n---",
        f"# {spec.name}",
        spec.description,
        _introduction(spec),
        "## Use",
        _use(spec, repo or repository(spec), base_model),
        *_results(spec),
        "## Adapter",
        _table(("", ""), _facts(adapter)),
        *_training(spec),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def metric_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Name, the base's value, the adapter's value, of each metric; blank where unmeasured.

    The base's is stored under the same name with ``base_`` before it (after the split).
    """
    rows = []
    for name, value in metrics.items():
        if "base_" in name:
            continue
        split, _, rest = name.partition("_")
        base = metrics.get(f"{split}_base_{rest}", metrics.get(f"base_{name}"))
        rows.append((name, "" if base is None else f"{base:.4f}", f"{value:.4f}"))
    return rows


def _front_matter(spec: AdapterSpec, base_model: str | None) -> str:
    """YAML that a hub files the adapter by."""
    base = base_model or spec.base.name
    licence = spec.licence.lower()
    found = list(_measured(spec))
    data = ModelCardData(
        base_model=base if _HUB_ID.fullmatch(base) else None,
        library_name=LIBRARY,
        license=licence if licence in _LICENCES else "other" if licence else None,
        license_name=spec.licence if licence and licence not in _LICENCES else None,
        pipeline_tag=_TASKS[spec.task.kind],
        tags=["reft", "representation-finetuning", spec.method],
        datasets=_hub_dataset(spec),
        metrics=sorted({result.metric_type for result in found}) or None,
        model_name=spec.name if found else None,
        eval_results=found or None,
    )
    return str(data.to_yaml())


def _measured(spec: AdapterSpec) -> list[EvalResult]:
    """The adapter's figures on the split that counts, losses left out."""
    metrics, data = spec.training.metrics, spec.training.data
    split = next((s for s in _SPLITS if any(name.startswith(f"{s}_") for name in metrics)), None)
    if split is None:
        return []
    names = {
        name: name.removeprefix(f"{split}_") for name in metrics if name.startswith(f"{split}_")
    }
    return [
        EvalResult(
            task_type=_TASKS[spec.task.kind],
            dataset_type=str(data.get(f"{split}_file", split)),
            dataset_name=str(data.get(f"{split}_file", split)),
            dataset_split=_SPLITS[split],
            metric_type=metric,
            metric_value=metrics[name],
        )
        for name, metric in names.items()
        if not metric.startswith("base_") and metric not in _LOSSES
    ]


def _hub_dataset(spec: AdapterSpec) -> list[str] | None:
    """The hub's data set it was trained on, if it was one."""
    name = str(spec.training.data.get("dataset", ""))
    return [name] if _HUB_ID.fullmatch(name) else None


def _introduction(spec: AdapterSpec) -> str:
    what = f"`{spec.method}` adapter, {spec.num_parameters:,} numbers"
    return (
        f"A {what}, for **{spec.base.name}**. It edits hidden states of the frozen model, which is "
        f"not in this file. It is served by {LIBRARY}, many such adapters in one batch."
    )


def _use(spec: AdapterSpec, repo: str, base_model: str | None) -> str:
    model = base_model or (DEMO_MODEL if spec.base.name == DEMO_NAME else spec.base.name)
    route, body = "chat/completions", '"messages": [{"role": "user", "content": "…"}]'
    if spec.task.kind != "generation":
        route, body = "classify", '"input": ["…"]'
    lines = [
        f"reft serve --model {model} --adapter {repo}",
        f"curl -s http://127.0.0.1:8000/v1/{route} -H 'Content-Type: application/json' \\",
        f'  -d \'{{"model": "{spec.name}", {body}}}\'',
    ]
    code = "\n".join(lines)
    return f"```sh\n{code}\n```" + (
        f"\n\n`POST /v1/classify` also gives the likelihood of each of its {len(spec.task.labels)} "
        "labels."
        if spec.task.labels and spec.task.kind == "generation"
        else ""
    )


def _results(spec: AdapterSpec) -> list[str]:
    if not spec.training.metrics:
        return []
    data = spec.training.data
    measured = [
        f"{split}: {data[f'{split}_rows']} rows of {data[f'{split}_file']}, "
        f"SHA-256 `{data[f'{split}_sha256']}`"
        for split in ("train", "valid", "test")
        if {f"{split}_rows", f"{split}_file", f"{split}_sha256"} <= data.keys()
    ]
    return [
        "## Results",
        _table(("metric", "base", "adapter"), metric_rows(spec.training.metrics)),
        "\n".join(f"- {_cell(line)}" for line in measured),
    ]


def _facts(adapter: Adapter) -> list[tuple[str, str]]:
    spec = adapter.spec
    facts = [
        ("digest", f"`{adapter.digest}`"),
        ("size", f"{adapter.num_bytes:,} bytes"),
        ("base", f"{spec.base.name}, config fingerprint `{spec.base.fingerprint[:16]}…`"),
        ("method", spec.method),
    ]
    if spec.sites:
        tying = "tied" if adapter.rule.num_units == 1 else "untied"
        facts.append(("positions", f"{spec.positions.rule}, {tying}"))
    for site, found in spec.sites.items():
        layers = ", ".join(map(str, found.layers))
        facts.append((site, f"layers {layers}; rank {found.rank}"))
    if spec.prefix is not None:
        facts.append(("prefix", f"{spec.prefix.length} virtual tokens"))
    if spec.task.labels:
        facts.append(("labels", ", ".join(label.strip() for label in spec.task.labels)))
    if spec.licence:
        facts.append(("licence", f"{spec.licence}; the base model has its own"))
    return [(name, _cell(value)) for name, value in facts]


def _training(spec: AdapterSpec) -> list[str]:
    training = spec.training
    rows = [(name, str(value)) for name, value in training.hyperparameters.items()]
    rows += [("seed", str(training.seed))] if training.seed is not None else []
    rows += [("made by", training.tool)] if training.tool else []
    rows += [("made at", training.created_at)] if training.created_at else []
    sections = ["## Training", _table(("", ""), [(n, _cell(v)) for n, v in rows])] if rows else []
    if training.command:
        sections.append(f"```sh\n{training.command.replace('```', '')}\n```")
    return sections


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """Text that fits a Markdown table's cell or a list's line, and stays text."""
    flat = " ".join(text.split())
    short = flat if len(flat) <= _MAX_CELL else f"{flat[: _MAX_CELL - 1]}…"
    return short.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
