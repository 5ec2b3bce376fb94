"""``docs/results.md`` as a pure function of the committed documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS
from benchmarks.quality import minute, together
from benchmarks.quality.plan import GROUPS, NOT_RUN
from benchmarks.quality.tables import number, shown, table
from benchmarks.quality.tasks import SEEDS
from benchmarks.quality.verdicts import Verdict, advice, verdict

Document = Mapping[str, Any]

PAGE = Path(__file__).parents[2] / "docs" / "results.md"

_NONE = "–"
_INTRO = """# Results on real data

What adapters trained here reach on published data sets, beside the untrained base, a linear head
on its frozen states, and LoRA of rank 8 on the query and value maps whose learning rate was
searched too (of encoders on trec and sst2 alone; others take trec's). Every figure is read from
[benchmarks/results](../benchmarks/results) (`train-*.json`); this page is written from those
files by `python -m benchmarks.quality report`. [comparing.md](comparing.md) says how to do the
same with data of your own."""

_READING = """## How to read the tables

- **Intervals** are 95 %, half their width after the ±: test rows and seeds are drawn with
  replacement a thousand times. Differences are of the same rows in the same draws. With one seed
  they know nothing of seeds.
- **No test row chose anything.** Learning rates, and positions where they were searched, are
  those of the best validation figure with seed 0 (what was tried is listed under each table; a
  method that is not there has the setting of an earlier development run); the test split is read
  afterwards, once for each seed.
- **Untrained** is the base asked as the adapters are. Where answers are labels, the wording of
  its prompt is the best of several on validation rows, and all methods have the same.
- **LoRA** is ours on causal models, which reads what prompts have in common once, and PEFT's on
  encoders; α = 2r and no dropout in both.
- **Parameters** are those trained; **bytes** those of the saved tensors.
- **CPU s** are seconds that one core spent in training steps, of the longest of a method's
  trainings: those after the first find computed what the base has to compute once. Validation
  is left out. The machine was shared, so that time on the clock says little."""


def read_documents(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The committed documents, in the order of the plan."""
    paths = [folder / f"train-{name}.json" for name in NOT_RUN]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def read_minute(folder: Path = RESULTS) -> dict[str, Any] | None:
    """How long trainings took with the machine to themselves; None if that is not known."""
    path = folder / f"{minute.NAME}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def render(documents: Sequence[Document], times: Document | None = None) -> str:
    """The page."""
    parts = [_INTRO, _in_short(documents, times), _READING, _how(documents)]
    for group, (title, text) in GROUPS.items():
        own = [document for document in documents if document["group"] == group]
        if own:
            parts += [f"## {title}", text, *(_task(document) for document in own)]
    parts += [_choosing(documents), _not_run(documents)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _in_short(documents: Sequence[Document], times: Document | None) -> str:
    """One line a task: the smallest LoReFT beside LoRA, and in words where each is ahead."""
    verdicts = [found for document in documents if (found := verdict(document))]
    header = ["task", "base", "metric", "untrained", "head only", "LoReFT", "parameters", "LoRA"]
    rows = [_short_cells(found) for found in verdicts]
    lines = [f"- {line}" for line in _verdict_lines(verdicts)]
    if times is not None:
        lines.append(f"- {minute.sentence(times)}")
    summary = table([*header, "parameters", "LoReFT − LoRA", "CPU s"], rows)
    return "\n\n".join(["## In short", summary, "\n".join(lines)])


def _short_cells(found: Verdict) -> list[str]:
    document, reft, lora = found.document, found.reft, found.lora
    return [
        document["task"],
        document["model"],
        _metric_name(document),
        _quality(document, found.untrained) if found.untrained else _NONE,
        _quality(document, found.head) if found.head else _NONE,
        _quality(document, reft),
        f"{reft['parameters']:,}",
        _quality(document, lora),
        f"{lora['parameters']:,}",
        shown(reft["difference"], document["percent"], signed=True),
        f"{_cpu(reft)} : {_cpu(lora)}",
    ]


def _verdict_lines(verdicts: Sequence[Verdict]) -> Iterable[str]:
    """Which tasks are ahead, level and behind, in words."""
    words = {
        "ahead": "LoReFT is ahead of LoRA, the whole interval above it",
        "level": "Level within the interval",
        "behind": "LoReFT is behind, the whole interval below LoRA",
    }
    for outcome, text in words.items():
        names = [each.name for each in verdicts if each.outcome == outcome]
        yield f"{text}: {', '.join(names) if names else 'no task'}."


def _how(documents: Sequence[Document]) -> str:
    runs = [each for doc in documents for some in doc["provenance"].values() for each in some]
    machines = sorted({f"{run['cpu']}, {run['threads']} thread" for run in runs})
    versions = sorted({f"torch {run['torch']}, transformers {run['transformers']}" for run in runs})
    commits = sorted({run["commit"] for run in runs})
    dates = sorted({run["date"][:10] for run in runs})
    return (
        "## How it was run\n\n"
        "```sh\npython -m benchmarks.quality run --data DATA --tasks "
        f"{' '.join(document['task'] for document in documents)}\n"
        "python -m benchmarks.quality report --data DATA\n```\n\n"
        f"Hardware: {'; '.join(machines)}. Versions: {'; '.join(versions)}. Commits: "
        f"{', '.join(commits)}. Dates: {', '.join(dates)}. Optimiser: AdamW, no weight decay, "
        "clipping at 1, 6 % warm-up, then linear decay to 0. The frozen base is in bfloat16 for "
        "causal models and in float32 for encoders; edits are float32."
    )


def _task(document: Document) -> str:
    """A task's section: rows and prompt, the table, the search."""
    if document["group"] == "domains":
        return together.section(document)
    also = list(document["results"][0]["also"])
    measured = [_metric_name(document), "− LoRA", *also]
    header = ["method", "setting", "parameters", *measured, "seeds", "CPU s"]
    rows = [_cells(document, result) for result in document["results"]]
    parts = [
        f"### {document['task']}",
        _about(document),
        table([*header, "bytes"], rows),
        _searches(document),
    ]
    return "\n\n".join(part for part in parts if part)


def _about(document: Document) -> str:
    steps = max(result["steps"] for result in document["results"])
    parts = [
        f"{document['train_rows']:,} training rows, {steps} steps, {document['valid_rows']:,} of "
        f"validation, {document['test_rows']:,} of {document['of_test_rows']:,} test rows"
        + (f", {_labels(document)}" if document["labels"] else "")
        + "."
    ]
    if document["prompt"]:
        text = "".join(document["prompt"].values()).replace("\n", "⏎")
        parts.append(f"Prompt: `{text.replace('{content}', '…')}`.")
    return " ".join(parts)


def _labels(document: Document) -> str:
    share = number(document["most_frequent"], percent=True)
    return f"{document['labels']} labels, of which one is right for {share} %"


def _cells(document: Document, result: Document) -> list[str]:
    difference = result["difference"]
    return [
        result["label"],
        setting_text(result["setting"]),
        f"{result['parameters']:,}",
        _quality(document, result),
        shown(difference, document["percent"], signed=True) if difference else _NONE,
        *(shown(each, percent=True) for each in result["also"].values()),
        str(len(result["seeds"])),
        _cpu(result),
        f"{result['file_bytes']:,}",
    ]


def _searches(document: Document) -> str:
    """What each search tried, with its validation figure."""
    lines = []
    for result in document["results"]:
        tried = [
            f"{setting_text(each['setting'])}: {_validation(document, each)}"
            for each in result["searched"]
        ]
        if tried:
            lines.append(f"- {result['label']} ({result['part']}): {'; '.join(tried)}")
    return "Searched on validation rows:\n\n" + "\n".join(lines) if lines else ""


def _validation(document: Document, tried: Document) -> str:
    if tried["error"]:
        return "failed"
    valid = tried["valid"]
    if document["metric"] not in valid:
        return f"loss {valid['loss']:.3f}"
    return number(valid[document["metric"]], document["percent"])


def _choosing(documents: Sequence[Document]) -> str:
    lines = advice(documents)
    return "## Which setting to choose\n\n" + "\n".join(f"- {x}" for x in lines) if lines else ""


def _not_run(documents: Sequence[Document]) -> str:
    """What of the plan has no figures."""
    done = {document["task"] for document in documents}
    lines = [f"- {name}: {what}" for name, what in NOT_RUN.items() if name not in done]
    for document in documents:
        if missing := [
            f"{each['method']} ({each['part']})" for each in document.get("not_run", ())
        ]:
            lines.append(f"- {document['task']}: {', '.join(missing)}")
        if fewer := _fewer_seeds(document):
            lines.append(f"- {document['task']}, seeds: {', '.join(fewer)}")
    return "## Not run\n\n" + "\n".join(lines) if lines else ""


def _fewer_seeds(document: Document) -> list[str]:
    """Methods that draw and were tested with fewer seeds than planned."""
    return [
        f"{result['label']} has {len(result['seeds'])} of {len(SEEDS)}"
        for result in document["results"]
        if document["group"] != "domains"
        and result["method"] != "zero_shot"
        and len(result["seeds"]) < len(SEEDS)
    ]


_SHORT = {"learning_rate": "lr", "rank": "r", "positions": "", "layers": "layers"}
_ORDER = ("rank", "positions", "layers")
"""Of settings that are shown first; the learning rate is the last."""


def setting_text(setting: Mapping[str, Any]) -> str:
    """``r 1, l1, lr 0.008``: a method's settings in few words."""
    first = [name for name in _ORDER if name in setting]
    others = [name for name in setting if name not in (*_ORDER, "learning_rate")]
    rate = ["learning_rate"] if "learning_rate" in setting else []
    parts = []
    for name in (*first, *others, *rate):
        value = setting[name]
        text = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{_SHORT.get(name, name)} {text}".strip())
    return ", ".join(parts)


def _quality(document: Document, result: Document) -> str:
    return shown(result["quality"], document["percent"])


def _metric_name(document: Document) -> str:
    name = str(document["metric"]).replace("likelihood_", "")
    return f"{name} ↓" if document["lower_is_better"] else name


def _cpu(result: Document) -> str:
    return f"{result['training_cpu_seconds'][-1]:.0f}"
