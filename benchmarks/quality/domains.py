"""One adapter for each domain of clinc150, and all of them in one engine.

Every text is asked of its own domain's adapter, in batches that mix the domains; texts out of
all scopes have none and are left out.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.quality.rows import prepare, read_rows
from benchmarks.quality.run import base_model
from benchmarks.quality.summary import without_folders
from benchmarks.quality.tasks import ENCODER, QualityTask
from reft_core.adapter import decode_adapter, write_durably
from reft_core.classification import EncoderClassifier, EncoderEngine, TextRequest, classify
from reft_core.engine.config import EngineConfig
from reft_core.engine.interface import AdapterChoice
from reft_core.loading import LoadedModel
from trainer.config import TrainConfig
from trainer.evaluation.scoring import Resampling
from trainer.evaluation.scoring.base import mean_of
from trainer.progress import Progress
from trainer.train import train

TASK = "clinc150"
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
METHODS: Mapping[str, Mapping[str, Any]] = {
    "head_only": {"method": "none", "learning_rate": 2e-2},
    "loreft": {"method": "loreft", "rank": 2, "positions": "prompt", "learning_rate": 5e-3},
}
"""Nothing is searched here: rank and rate are those of an earlier development run."""

_CONFIG = {"epochs": 4, "batch_size": 32, "seed": 0}
_AT_ONCE = 256
"""Requests in one call, of all domains; the engine makes its batches of them."""

Texts = Sequence[tuple[str, str, str]]
"""Of each: its domain, the text, and its label."""


def run_domains(data: Path, out: Path, *, loaded: LoadedModel, progress: Progress) -> None:
    """Train what is missing, then serve everything together; the outcome is in ``out``."""
    folder = out / TASK
    for method in METHODS:
        found = [_trained(method, domain, data, out, loaded, progress) for domain in DOMAINS]
        result = {
            "method": method,
            "setting": dict(METHODS[method]),
            "adapters": found,
            **_served(folder / method, _texts(data, out), loaded),
            "provenance": provenance(),
        }
        write_durably(folder / f"{method}.json", json.dumps(result, indent=1).encode())


def summarise_domains(out: Path) -> dict[str, Any] | None:
    """What is done, as one document; None if nothing is."""
    paths = [out / TASK / f"{method}.json" for method in METHODS]
    found = [_read(path) for path in paths if path.exists()]
    if not found:
        return None
    runs = {result["method"]: [without_folders(result.pop("provenance"))] for result in found}
    return {"task": TASK, "group": "domains", "results": found, "provenance": runs}


def _task(domain: str) -> QualityTask:
    return QualityTask(
        f"{TASK}-{domain}", "domains", TASK, {}, where={"domain": domain}, base=ENCODER
    )


def _trained(
    method: str,
    domain: str,
    data: Path,
    out: Path,
    loaded: LoadedModel,
    progress: Progress,
) -> dict[str, Any]:
    """One domain's adapter file, unless it is there, and what its training took."""
    file = out / TASK / method / f"{domain}.safetensors"
    about = file.with_suffix(".json")
    setting = _CONFIG | dict(METHODS[method])
    if not about.exists() or _read(about)["config"] != setting:
        task = _task(domain)
        config = TrainConfig(
            data=str(prepare(task, data, out)),
            model=base_model(ENCODER),
            name=domain,
            output=file,
            report_dir=out / TASK / method / "reports" / domain,
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


def _texts(data: Path, out: Path) -> Texts:
    """The test texts of all domains, mixed."""
    found = []
    for domain in DOMAINS:
        folder = prepare(_task(domain), data, out)
        rows = read_rows(folder / "test.jsonl")
        found += [(domain, row["text"], row["label"]) for row in rows]
    random.Random(0).shuffle(found)
    return found


def _served(folder: Path, texts: Texts, loaded: LoadedModel) -> dict[str, Any]:
    """How the adapters in ``folder`` answer the mixed texts, all in one engine."""
    adapters = {
        domain: decode_adapter((folder / f"{domain}.safetensors").read_bytes())
        for domain in DOMAINS
    }
    engine = EncoderEngine(loaded, EngineConfig(max_model_len=loaded.description.max_positions))
    engine.start()
    try:
        for adapter in adapters.values():
            engine.load_adapter(adapter)
        classifier = EncoderClassifier(engine, loaded.tokenizer)
        requests = [
            TextRequest(f"text-{number}", text, (AdapterChoice(adapters[domain].digest),))
            for number, (domain, text, _) in enumerate(texts)
        ]
        start = time.process_time()
        answers = [
            each.best
            for place in range(0, len(requests), _AT_ONCE)
            for each in classify(classifier, requests[place : place + _AT_ONCE])
        ]
        seconds = time.process_time() - start
    finally:
        engine.stop()
    right = [float(answer == label) for answer, (_, _, label) in zip(answers, texts, strict=True)]
    return {
        "test_rows": len(texts),
        "quality": _estimate(right),
        "serving_cpu_seconds": round(seconds, 2),
        "by_domain": {
            domain: _estimate([r for r, t in zip(right, texts, strict=True) if t[0] == domain])
            for domain in DOMAINS
        },
    }


def _estimate(right: Sequence[float]) -> dict[str, float]:
    found = Resampling.of(len(right), seed=0).estimate(mean_of(right))
    return {name: round(value, 4) for name, value in vars(found).items()}
