"""Turns what was measured into ratios, a table, and the summary that is the last line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.compare import Measured, Outcome
from benchmarks.peers.contenders import CONTINUOUS, OURS, STATIC
from benchmarks.plan import HEADLINE, TAX_COUNTS
from benchmarks.spreads import spread, spread_of_ratios
from benchmarks.workloads import WORKLOADS

_SHORT = {"bfloat16": "bf16", "float32": "f32"}


def compared(name: str, measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Each peer on one workload: tokens/s, and how many times as fast this project is."""
    workload = WORKLOADS[name]
    ours = measured[OURS].seconds if OURS in measured else []
    rows = {}
    for peer, run in measured.items():
        rates = [workload.num_generated / seconds for seconds in run.seconds]
        if not rates:
            continue
        pairs = min(len(ours), len(run.seconds))  # a slow peer has fewer repeats, the first ones
        rows[peer] = {
            "option": run.option,
            "repeats": len(rates),
            "tokens_per_s": spread(rates, 1),
            "ours_over_theirs": spread_of_ratios(run.seconds[:pairs], ours[:pairs])
            if pairs
            else None,
            "tried_tokens_per_s": {
                option: round(workload.num_generated / seconds, 1)
                for option, seconds in run.tried.items()
            },
        }
    return rows


def throughput(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """By dtype: each workload's rows, what is missing and why, and what peers are."""
    return {
        dtype: {
            "workloads": {
                name: {"title": WORKLOADS[name].title, "peers": compared(name, measured)}
                for name, measured in outcome.measured.items()
            },
            "missing": outcome.missing,
            "about": outcome.about,
        }
        for dtype, outcome in outcomes.items()
    }


def table(document: Mapping[str, Any]) -> str:
    """Everything that was measured, as lines of text."""
    lines = _throughput_lines(document.get("throughput", {}))
    for dtype, row in document.get("roofline", {}).items():
        lines.append(f"\n{dtype}, batch 16, context 128, and prompts of 1,000 tokens")
        lines += [f"  {name:28}{value:>12}" for name, value in row.items()]
    taxes = {OURS: document.get("adapter_tax", {}), **document.get("peer_tax", {})}
    for peer, rows in taxes.items():
        for name, row in rows.items():
            if name.startswith("K="):
                shown = ", ".join(f"{key} {value}" for key, value in row.items())
                lines.append(f"  {peer} with {name:6} adapters: {shown}")
            elif name == "missing":
                lines.append(f"  missing: {peer} with adapters: {row}")
    for name in ("residency", "fanout"):
        lines += [f"  {key:28}{value!s:>12}" for key, value in document.get(name, {}).items()]
    return "\n".join(lines)


def _throughput_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for dtype, section in found.items():
        for part in section["workloads"].values():
            lines.append(f"\n{dtype}, {part['title']}")
            lines.append(f"  {'':24}{'tokens/s (least, most)':>28}{'ours / theirs':>24}")
            for peer, row in part["peers"].items():
                low, middle, high = row["tokens_per_s"]
                rate = f"{middle:.0f} ({low:.0f}, {high:.0f})"
                ratio = ""
                if peer != OURS and row["ours_over_theirs"]:
                    low, middle, high = row["ours_over_theirs"]
                    ratio = f"{middle:.2f} ({low:.2f}, {high:.2f})"
                lines.append(f"  {peer:24}{rate:>28}{ratio:>24}   {row['option']}")
        lines += [f"  missing: {name}: {why}" for name, why in section["missing"].items()]
    return lines


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """The headline figures; null where nothing was measured."""
    figures: dict[str, Any] = {}
    for peer in ("vllm", "llamacpp", STATIC, CONTINUOUS):
        for dtype, short in _SHORT.items():
            figures[f"vs_{peer}_{short}"] = _dig(
                document, "throughput", dtype, "workloads", HEADLINE, "peers", peer,
                "ours_over_theirs", 1,
            )  # fmt: skip
    for name in ("decode_over_roofline", "prefill_fraction_of_peak"):
        figures[name] = _dig(document, "roofline", "bfloat16", name)
    for count in TAX_COUNTS:
        figures[f"tax_{count}"] = _dig(document, "adapter_tax", f"K={count}", "throughput_ratio", 1)
    figures["itl_ratio_256"] = _dig(document, "adapter_tax", "K=256", "token_gap_ratio", 1)
    figures["registered_10k_ratio"] = _dig(document, "residency", "registered_10k_ratio")
    figures["cold_load_ms"] = _dig(document, "residency", "cold_load_cached_ms", "median")
    figures["fanout_16"] = _dig(document, "fanout", "fanout_16")
    figures["gate"] = _dig(document, "gate", "passed")
    return figures


def _dig(tree: Any, *path: str | int) -> Any:
    """What lies at the end of ``path``, or None if it leads nowhere."""
    for step in path:
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return None
    return tree
