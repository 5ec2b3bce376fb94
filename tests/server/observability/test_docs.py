"""docs/observability.md lists what /metrics has: every metric, its type, labels and meaning."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.fakes import MODEL, make_adapter

PAGE = Path(__file__).parents[3] / "docs" / "observability.md"


def row(name: str, kind: str, labels: set[str], meaning: str) -> str:
    shown = ", ".join(f"`{label}`" for label in sorted(labels)) or "none"
    return f"| `{name}` | {kind} | {shown} | {meaning} |"


def test_the_page_lists_what_a_scrape_returns(server):
    server.upload("tone", make_adapter(1))
    ask = {"model": "tone", "prompt": "hi", "max_tokens": 3}
    assert server.http.post("/v1/completions", json=ask).status_code == 200
    rows = []
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        name = family.name + "_total" * (family.type == "counter")
        labels = {label for sample in family.samples for label in sample.labels}
        rows.append(row(name, family.type, labels - {"le", "model_name"}, family.documentation))
    listed = [
        line for line in PAGE.read_text().splitlines() if line.startswith(("| `reft_", "| `p"))
    ]
    assert listed == sorted(rows), "the page must list:\n" + "\n".join(sorted(rows))


def test_the_page_names_what_vllm_calls_the_same():
    from server.observability.exposition import VLLM_NAMES

    page = PAGE.read_text()
    assert [name for name in sorted(VLLM_NAMES) if f"`{name}`" not in page] == []


def test_every_metric_has_the_models_name(server):
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        if family.name.startswith("reft_"):
            assert all(s.labels["model_name"] == MODEL.name for s in family.samples)
