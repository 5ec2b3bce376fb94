"""The page's section on adapters that are served together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.tables import number, shown, table

Document = Mapping[str, Any]

_LABELS = {"zero_shot": "zero-shot", "head_only": "head only", "loreft": "LoReFT"}


def section(document: Document) -> str:
    """Accuracy of each domain's adapter, all of them in one engine."""
    results = document["results"]
    names = [_LABELS[result["method"]] for result in results]
    rows = [_cells(document, domain) for domain in results[0]["by_domain"]]
    every = [shown(result["quality"], percent=True) for result in results]
    costs = [f"- {_LABELS[r['method']]}: {_cost(r)}" for r in results if r["adapters"]]
    header = ["domain", *names]
    if len(results) > 1:
        header.append("difference")
        rows.append(["**all**", *every, _gain([r["quality"]["value"] for r in results])])
    else:
        rows.append(["**all**", *every])
    return "\n\n".join(
        [
            f"### {document['task']}",
            f"{document['model']}; {results[0]['test_rows']:,} test texts in random order, one "
            "training seed.",
            table(header, rows),
            "\n".join(costs),
        ]
    )


def _cells(document: Document, domain: str) -> list[str]:
    found = [result["by_domain"][domain] for result in document["results"]]
    cells = [domain, *(shown(each, percent=True) for each in found)]
    return [*cells, _gain([each["value"] for each in found])] if len(found) > 1 else cells


def _gain(values: list[float]) -> str:
    return number(values[-1] - values[0], percent=True, signed=True)


def _cost(result: Document) -> str:
    """What the adapters of one method are and took."""
    adapters = result["adapters"]
    seconds = [adapter["training_cpu_seconds"] for adapter in adapters]
    sizes = [adapter["file_bytes"] for adapter in adapters]
    return (
        f"{len(adapters)} files of {min(sizes):,} to {max(sizes):,} bytes, "
        f"{adapters[0]['parameters']:,} parameters each, {min(seconds):.0f} to "
        f"{max(seconds):.0f} CPU s of training; all {result['test_rows']:,} answers took "
        f"{result['serving_cpu_seconds']:.0f} CPU s"
    )
