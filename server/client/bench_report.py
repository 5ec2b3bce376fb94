"""What a run of ``reft bench`` found, as a table and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from server.cli.text import printable
from server.client.measure import Run, Seen

PERCENTILES = (50, 95, 99)
ALL = "all"


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value that ``percent`` of ``values`` do not exceed (nearest rank); None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def summarise(seen: Sequence[Seen], took_s: float) -> dict[str, Any]:
    """Counts, rates and percentiles of some requests; times in milliseconds.

    Rates are over ``took_s``, the whole run, so those of several models add up to the total.
    """
    good = [each for each in seen if each.error is None]
    tokens = sum(each.num_tokens for each in good)
    firsts = [each.ttft_s for each in good if each.ttft_s is not None]
    gaps = [gap for each in good for gap in each.gaps_s]
    wholes = [each.ended_at - each.began_at for each in good]
    errors = Counter(each.error for each in seen if each.error is not None)
    return {
        "requests": len(seen),
        "errors": len(seen) - len(good),
        "error_messages": dict(errors.most_common(5)),
        "prompt_tokens": sum(each.num_prompt_tokens for each in good),
        "completion_tokens": tokens,
        "requests_per_s": len(good) / took_s if took_s else 0.0,
        "tokens_per_s": tokens / took_s if took_s else 0.0,
        "ttft_ms": _percentiles(firsts),
        "inter_token_ms": _percentiles(gaps),
        "request_ms": _percentiles(wholes),
    }


def document(run: Run, models: Sequence[str], asked: dict[str, Any]) -> dict[str, Any]:
    """Everything about a run: what was asked, then each model, then all together."""
    return {
        **asked,
        "seconds": run.took_s,
        "stopped": run.was_stopped,
        "models": {
            model: summarise([s for s in run.seen if s.model == model], run.took_s)
            for model in models
        },
        ALL: summarise(run.seen, run.took_s),
    }


def table(found: dict[str, Any]) -> Table:
    """The figures of a run: a row a model, and one of all where there are several."""
    shown = Table(
        title=f"{found[ALL]['requests']} requests in {found['seconds']:.1f} s, "
        f"{found['concurrency']} at a time"
    )
    shown.add_column("model", overflow="fold")
    for heading in ("requests", "errors", "tokens/s"):
        shown.add_column(heading, justify="right")
    percents = "/".join(f"p{percent}" for percent in PERCENTILES)
    shown.add_column(f"TTFT ms\n{percents}", justify="right")
    shown.add_column(f"inter-token ms\n{percents}", justify="right")
    rows = list(found["models"].items())
    if len(rows) > 1:
        rows.append((ALL, found[ALL]))
    for name, row in rows:
        shown.add_row(
            printable(name),
            str(row["requests"]),
            str(row["errors"]),
            f"{row['tokens_per_s']:.1f}",
            _cell(row["ttft_ms"]),
            _cell(row["inter_token_ms"]),
        )
    return shown


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    found = {f"p{percent}": percentile(seconds, percent) for percent in PERCENTILES}
    return {name: None if value is None else value * 1000 for name, value in found.items()}


def _cell(row: dict[str, float | None]) -> str:
    return " / ".join("–" if value is None else f"{value:.1f}" for value in row.values())
