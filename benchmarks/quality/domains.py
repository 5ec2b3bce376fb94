"""One adapter for each domain of clinc150, and all of them in one engine.

Every text is asked of its own domain's adapter, in batches that mix the domains; texts out of
all scopes have none and are left out.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.quality.rows import prepare, read_rows
from benchmarks.quality.run import base_model
from benchmarks.quality.summary import without_folders
from benchmarks.quality.tasks import (
    CAUSAL,
    DTYPES,
    ENCODER,
    NAMES,
    QualityTask,
    Settings,
    template,
)
from reft_core.adapter import decode_adapter, write_durably
from reft_core.classification import (
    Classifier,
    EncoderEngine,
    TextRequest,
    classifier_on,
    classify,
)
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice
from reft_core.loading import LoadedModel, model_kind
from trainer.config import TrainConfig
from trainer.evaluation.scoring import Resampling
from trainer.evaluation.scoring.base import mean_of
from trainer.progress import Progress
from trainer.train import train

FOLDER = "clinc150"
"""Of the data."""
DOMAINS = (
    "auto_and_commute",
    "banking",
    "credit_cards",
    "home",
    "kitchen_and_dining",
    "meta",
    "small_talk",
    "travel",
    "utility",
    "work",
)
_AT_ONCE = 64
"""Texts in one call, of all domains; the engine makes its batches of them."""
_MAX_WAITING = 4096
"""More than these texts with all their labels, each of which a causal model is asked."""
_MAX_TOKENS = 256
"""More than any text has."""

Texts = Sequence[tuple[str, str, str]]
"""Of each: its domain, the text, and its label."""
Document = dict[str, Any]


@dataclass(frozen=True)
class DomainsTask:
    """All domains on one base."""

    name: str
    base: str
    methods: Mapping[str, Settings]
    """What each is trained with: nothing is searched, and these are all settings it has."""
    untrained: str | None = None
    """Method whose adapters are asked at strength 0 as well, which is the base alone."""

    @property
    def answering(self) -> dict[str, tuple[str, float]]:
        """Whose adapters answer, and at which strength, by the name that the result has."""
        base = {} if self.untrained is None else {"zero_shot": (self.untrained, 0.0)}
        return base | {method: (method, 1.0) for method in self.methods}


_SNIPS = {"rank": 1, "positions": "l1", "layers": "every:3", "learning_rate": 8e-3, "steps": 250}
_ENCODER = {"epochs": 4, "batch_size": 32}
_CAUSAL_TASK = DomainsTask(
    FOLDER,
    CAUSAL,
    {
        "loreft": _SNIPS
        | {
            "dtype": DTYPES[CAUSAL],
            "batch_size": 16,
            "template": template("Text: {content}\n", "Label:"),
        }
    },
    untrained="loreft",
)
_ENCODER_TASK = DomainsTask(
    f"{FOLDER}-encoder",
    ENCODER,
    {
        "head_only": {"method": "none", "learning_rate": 2e-2} | _ENCODER,
        "loreft": {"rank": 2, "positions": "prompt", "learning_rate": 5e-3} | _ENCODER,
    },
)
DOMAINS_TASKS = {task.name: task for task in (_CAUSAL_TASK, _ENCODER_TASK)}
"""The causal model's settings are those that snips' validation rows chose, the encoder's those of
an earlier development run."""


def run_domains(
    task: DomainsTask, data: Path, out: Path, *, loaded: LoadedModel, progress: Progress
) -> None:
    """Train what is missing, then serve everything together; the outcome is in ``out``."""
    folder = out / task.name
    trained = {
        method: [_trained(task, method, domain, data, out, loaded, progress) for domain in DOMAINS]
        for method in task.methods
    }
    texts = _texts(task, data, out)
    with _serving(loaded) as classifier:
        for name, (method, strength) in task.answering.items():
            files = {domain: folder / method / f"{domain}.safetensors" for domain in DOMAINS}
            result = {
                "method": name,
                "setting": dict(task.methods[method]) if strength else {},
                "adapters": trained[method] if strength else [],
                **_answered(classifier, files, strength, texts),
                "provenance": provenance(),
            }
            write_durably(folder / f"{name}.json", json.dumps(result, indent=1).encode())


def summarise_domains(task: DomainsTask, out: Path) -> Document | None:
    """What is done, as one document; None if nothing is."""
    paths = [out / task.name / f"{name}.json" for name in task.answering]
    found = [_read(path) for path in paths if path.exists()]
    if not found:
        return None
    runs = {result["method"]: [without_folders(result.pop("provenance"))] for result in found}
    return {
        "task": task.name,
        "group": "domains",
        "model": NAMES[task.base],
        "results": found,
        "provenance": runs,
    }


def _rows_of(task: DomainsTask, domain: str, data: Path, out: Path) -> Path:
    """The folder of one domain's rows, with labels in words."""
    labels = {
        row["label"]: row["label"].replace("_", " ")
        for row in read_rows(data / FOLDER / "train.jsonl")
        if row["domain"] == domain
    }
    name = f"{FOLDER}-{domain}"
    where = {"domain": domain}
    rows = QualityTask(name, "domains", FOLDER, {}, words=labels, where=where, base=task.base)
    return prepare(rows, data, out)


def _trained(
    task: DomainsTask,
    method: str,
    domain: str,
    data: Path,
    out: Path,
    loaded: LoadedModel,
    progress: Progress,
) -> Document:
    """One domain's adapter file, unless it is there, and what its training took."""
    file = out / task.name / method / f"{domain}.safetensors"
    about = file.with_suffix(".json")
    setting = dict(task.methods[method])
    if not about.exists() or _read(about)["config"] != setting:
        config = TrainConfig(
            data=str(_rows_of(task, domain, data, out)),
            model=base_model(task.base),
            name=domain,
            output=file,
            report_dir=file.parent / "reports" / domain,
            seed=0,
            **setting,
        )
        done = train(config, loaded=loaded, progress=progress)
        facts = {
            "domain": domain,
            "config": setting,
            "parameters": done.num_trainable,
            "training_cpu_seconds": round(done.fit.cpu_seconds, 1),
            "file_bytes": file.stat().st_size,
            "train_rows": len(done.datasets["train"].examples),
        }
        write_durably(about, json.dumps(facts).encode())
    return _read(about)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _texts(task: DomainsTask, data: Path, out: Path) -> Texts:
    """The test texts of all domains, mixed."""
    found = []
    for domain in DOMAINS:
        rows = read_rows(_rows_of(task, domain, data, out) / "test.jsonl")
        found += [(domain, row["text"], row["label"]) for row in rows]
    random.Random(0).shuffle(found)
    return found


@contextmanager
def _serving(loaded: LoadedModel) -> Iterator[Classifier]:
    """A classifier on an engine that ends with the block."""
    longest = min(_MAX_TOKENS, loaded.description.max_positions)
    config = EngineConfig(max_model_len=longest, max_num_seqs=32, max_waiting=_MAX_WAITING)
    is_encoder = model_kind(loaded.model.config) == "encoder"
    engine = (EncoderEngine if is_encoder else EmbeddedEngine)(loaded, config)
    engine.start()
    try:
        yield classifier_on(engine, loaded.tokenizer)
    finally:
        engine.stop()


def _answered(
    classifier: Classifier, files: Mapping[str, Path], strength: float, texts: Texts
) -> Document:
    """How the adapters in ``files``, by domain, answer the mixed texts, all in one engine."""
    chosen = {}
    for domain, file in files.items():
        adapter = decode_adapter(file.read_bytes())
        classifier.engine.load_adapter(adapter)
        chosen[domain] = (AdapterChoice(adapter.digest, strength),)
    requests = [
        TextRequest(f"text-{number}", text, chosen[domain])
        for number, (domain, text, _) in enumerate(texts)
    ]
    start = time.process_time()
    answers = [
        each.best
        for place in range(0, len(requests), _AT_ONCE)
        for each in classify(classifier, requests[place : place + _AT_ONCE])
    ]
    seconds = time.process_time() - start
    right = [float(answer == label) for answer, (_, _, label) in zip(answers, texts, strict=True)]
    return {
        "test_rows": len(texts),
        "quality": _estimate(right),
        "serving_cpu_seconds": round(seconds, 2),
        "by_domain": {
            domain: _estimate([r for r, t in zip(right, texts, strict=True) if t[0] == domain])
            for domain in files
        },
    }


def _estimate(right: Sequence[float]) -> dict[str, float]:
    found = Resampling.of(len(right), seed=0).estimate(mean_of(right))
    return {name: round(value, 4) for name, value in vars(found).items()}
