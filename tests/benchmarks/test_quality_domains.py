"""One adapter for each domain, all of them in one engine, and what the page says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import domains
from benchmarks.quality.domains import DomainsTask, run_domains, summarise_domains
from benchmarks.quality.tasks import CAUSAL, template
from benchmarks.quality.together import section
from tests.trainer.factories import byte_model
from trainer.progress import SilentProgress

INTENTS = {"home": ("light_on", "light_off"), "work": ("call", "email")}
TASK = DomainsTask(
    "clinc150",
    CAUSAL,
    {
        "loreft": {
            "rank": 1,
            "positions": "l1",
            "steps": 2,
            "batch_size": 2,
            "template": template("{content}\n", "Intent:"),
        }
    },
    untrained="loreft",
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(domains, "DOMAINS", tuple(INTENTS))
    folder = tmp_path / "data" / "clinc150"
    folder.mkdir(parents=True)
    for split, count in (("train", 4), ("valid", 1), ("test", 3)):
        rows = [
            {"id": f"{split}-{label}-{n}", "text": f"{split} {n} {label}", "label": label}
            | {"domain": domain}
            for domain, labels in INTENTS.items()
            for label in labels
            for n in range(count)
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder.parent


def test_each_text_is_asked_of_its_domain_s_adapter(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked: list[Any] = []
    original = domains.classify

    def noting(classifier: Any, requests: Sequence[Any]) -> Any:
        asked.extend(requests)
        return original(classifier, requests)

    monkeypatch.setattr(domains, "classify", noting)
    run_domains(TASK, data, out, loaded=byte_model(), progress=SilentProgress())
    document = summarise_domains(TASK, out)
    assert document is not None
    untrained, loreft = document["results"]
    assert (untrained["method"], untrained["adapters"]) == ("zero_shot", [])
    assert [adapter["domain"] for adapter in loreft["adapters"]] == ["home", "work"]
    assert loreft["test_rows"] == 12
    assert loreft["quality"]["value"] == pytest.approx(
        sum(each["value"] for each in loreft["by_domain"].values()) / 2  # six rows each
    )
    assert [request.adapters[0].strength for request in asked] == [0.0] * 12 + [1.0] * 12
    digests = {
        domain: {request.adapters[0].digest for request in asked if f" {label}" in request.text}
        for domain, (label, _) in INTENTS.items()
    }
    assert all(len(found) == 1 for found in digests.values())
    assert digests["home"] != digests["work"]


def test_what_is_trained_is_not_trained_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_domains(TASK, data, out, loaded=byte_model(), progress=SilentProgress())
    before = summarise_domains(TASK, out)
    monkeypatch.setattr(domains, "train", lambda *_args, **_kwargs: pytest.fail("trained again"))
    run_domains(TASK, data, out, loaded=byte_model(), progress=SilentProgress())
    after = summarise_domains(TASK, out)
    assert before is not None
    assert after is not None
    for one, other in zip(before["results"], after["results"], strict=True):
        assert one["by_domain"] == other["by_domain"]


def test_a_task_without_results_has_no_document(tmp_path: Path) -> None:
    assert summarise_domains(TASK, tmp_path) is None


def test_the_page_has_a_line_a_domain_and_what_adapters_cost() -> None:
    half, most = ({"value": v, "low": v - 0.1, "high": v + 0.1} for v in (0.5, 0.75))
    adapter = {"training_cpu_seconds": 3.0, "file_bytes": 5000, "parameters": 1200}
    results = [
        {"method": "zero_shot", "adapters": [], "quality": half, "by_domain": {"home": half}},
        {
            "method": "loreft",
            "adapters": [adapter, adapter | {"training_cpu_seconds": 4.4, "file_bytes": 4000}],
            "quality": most,
            "by_domain": {"home": most},
        },
    ]
    shared = {"test_rows": 1200, "serving_cpu_seconds": 21.4}
    text = section({"task": "clinc150", "model": "Small", "results": [r | shared for r in results]})
    assert "Small; 1,200 test texts" in text
    assert "| domain | zero-shot | LoReFT | difference |" in text
    assert "| home | 50.0 ± 10.0 | 75.0 ± 10.0 | +25.0 |" in text
    assert "| **all** | 50.0 ± 10.0 | 75.0 ± 10.0 | +25.0 |" in text
    assert (
        "- LoReFT: 2 files of 4,000 to 5,000 bytes, 1,200 parameters each, 3 to 4 CPU s of "
        "training; all 1,200 answers took 21 CPU s"
    ) in text
    assert "- zero-shot" not in text
