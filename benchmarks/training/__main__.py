"""One training step here, in pyreft 0.1.0 and in PEFT's LoRA: milliseconds and memory.

The same model, rows, batch of 16, optimiser and clipping for everyone, each in a process of its
own. Epochs are run in turn, so that a machine that slows down slows everyone, and ratios are
taken within a turn. The first epoch stands by itself: here it also computes what later ones keep
(keys and values before the first edited position); for the others it is a warm-up. ``naive`` is
our own edits by hooks on a padded batch, with a graph and logits everywhere.

The last line is JSON: how many times as long as ours a step takes, from the second epoch on; of
the dtypes that were measured, the least.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.peers.contenders import Variant, start, wait_loaded
from benchmarks.peers.environments import PEFT, PYREFT
from benchmarks.peers.protocol import PeerMissing, Worker
from benchmarks.provenance import provenance, save
from benchmarks.spreads import spread, spread_of_ratios
from benchmarks.training.rows import make_batches, with_positions
from benchmarks.training.steps import LORA_RANK, RANK, Row
from benchmarks.workloads import data_passages, own_passages
from reft_core.loading import DEMO_MODEL, materialise_demo_model

OURS = "reft"
SUFFIX, BOTH = "l1", "f7+l7"
_PACKAGE = "benchmarks.training"
_PEERS = {
    OURS: (f"{_PACKAGE}.own_worker", None),
    "naive": (f"{_PACKAGE}.naive_worker", None),
    "pyreft": (f"{_PACKAGE}.pyreft_worker", PYREFT),
    "peft_lora": (f"{_PACKAGE}.lora_worker", PEFT),
}
FIGURES = {
    "vs_pyreft_suffix": (SUFFIX, "pyreft"),
    "vs_pyreft_prefix_suffix": (BOTH, "pyreft"),
    "vs_peft_lora_suffix": (SUFFIX, "peft_lora"),
}
_EPOCH_S = 900.0

Results = dict[str, dict[str, dict[str, Any]]]
"""By dtype and rule: each contender's figures, or why it is ``missing``."""


def main() -> None:
    """Measure, print a table, save everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO_MODEL, help="demo, or a folder with a Llama")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2, help="steps of an epoch")
    parser.add_argument("--repeats", type=int, default=5, help="epochs after the first")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="bfloat16 and two repeats alone")
    parser.add_argument("--data", type=Path, default=os.environ.get("REFT_DATA") or None)
    options = parser.parse_args()
    if options.quick:
        options.dtypes, options.repeats = ["bfloat16"], 2

    disable_progress_bar()
    folder = materialise_demo_model() if options.model == DEMO_MODEL else Path(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    passages, source = _passages(options.data)
    batches = make_batches(
        passages,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
        batch_size=options.batch_size,
        num_batches=options.batches,
    )
    results: Results = {}
    for dtype in options.dtypes:
        results[dtype] = {}
        for rule in (SUFFIX, BOTH):
            found = _measure(folder, options, dtype, rule, with_positions(batches, rule))
            results[dtype][rule] = found
            print(_table(f"{dtype}, {rule}", found), flush=True)
    document: dict[str, object] = {
        **provenance(),
        "model": folder.name,
        "texts": source,
        "tokens": _sizes(batches),
        "ranks": {"loreft": RANK, "lora": LORA_RANK},
        "results": results,
    }
    figures = summary(results)
    print("saved to", save(f"train-steps{'-quick' * options.quick}", {**document, **figures}))
    print(json.dumps(figures))


def summary(results: Results) -> dict[str, float | None]:
    """Each figure of :data:`FIGURES`; None where somebody is missing."""
    found: dict[str, float | None] = {}
    for name, (rule, peer) in FIGURES.items():
        ratios = [by_rule[rule][peer].get("over_ours") for by_rule in results.values()]
        found[name] = None if None in ratios else min(ratio[1] for ratio in ratios)
    return found


def _passages(data: Path | None) -> tuple[list[str], str]:
    """Texts, and where they are from: SST-2 if the folder ``data`` has it."""
    if data is None:
        return own_passages(), "benchmarks/prompts.txt"
    folder = Path(data) / "sst2" if (Path(data) / "sst2").is_dir() else Path(data)
    return data_passages(folder), f"texts of {folder.name}"


def _sizes(batches: Sequence[Sequence[Row]]) -> dict[str, float]:
    """How long rows are, and how much padding they need."""
    lengths = [[len(row["prompt"]) + len(row["completion"]) for row in rows] for rows in batches]
    every = [length for batch in lengths for length in batch]
    padded = sum(max(batch) * len(batch) for batch in lengths)
    return {
        "batch_size": len(batches[0]),
        "median": median(every),
        "longest": max(every),
        "share_of_padding": round(1 - sum(every) / padded, 3),
    }


def _measure(
    folder: Path,
    options: argparse.Namespace,
    dtype: str,
    rule: str,
    batches: list[list[Row]],
) -> dict[str, Any]:
    """Every contender's figures for one dtype and rule."""
    found: dict[str, Any] = {}
    epochs: dict[str, list[dict[str, Any]]] = {}
    load = {"rule": rule, "batches": batches}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, (module, environment) in _PEERS.items():
            try:
                variant = Variant(name, rule, module, environment, load)
                worker = start(variant, folder, str(folder), dtype, options.threads)
                workers[name] = stack.enter_context(worker)
            except PeerMissing as error:
                found[name] = {"missing": str(error)}
        for name, worker in list(workers.items()):
            try:
                found[name] = {k: v for k, v in wait_loaded(worker).items() if k != "ok"}
            except PeerMissing as error:
                found[name] = {"missing": str(error)}
                del workers[name]
        for _ in range(1 + options.repeats):
            for name, worker in list(workers.items()):
                try:
                    epochs.setdefault(name, []).append(worker.ask("epoch", _EPOCH_S))
                except PeerMissing as error:
                    found[name] = {"missing": str(error)}
                    del workers[name]
    for name in workers:
        found[name] |= _figures(epochs[name], epochs.get(OURS) if OURS in workers else None)
    return found


def _figures(
    epochs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """What the epochs of one contender come to, the first by itself."""

    def steps(measured: Sequence[Mapping[str, Any]]) -> list[float]:
        return [sum(epoch["ms"]) / len(epoch["ms"]) for epoch in measured]

    first, *rest = steps(epochs)
    figures = {
        "first_epoch_ms": round(first, 1),
        "ms": spread(rest, 1),
        "peak_mib": round(max(epoch["peak_mib"] for epoch in epochs)),
        "losses": [round(loss, 4) for epoch in epochs for loss in epoch["losses"]],
    }
    if ours is not None:
        own_first, *own = steps(ours)
        figures["over_ours"] = spread_of_ratios(rest, own, 2)
        figures["first_epoch_over_ours"] = round(first / own_first, 2)
    return figures


def _table(title: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures for people."""
    lines = [f"{title:<20}{'ms a step (least, median, most)':<34}first epoch  peak MiB  times ours"]
    for name, row in found.items():
        if "missing" in row:
            lines.append(f"  {name:<18}missing: {row['missing']}")
            continue
        low, mid, high = row["ms"]
        times = row.get("over_ours", [0.0, 0.0, 0.0])
        lines.append(
            f"  {name:<18}{f'{low:.0f}, {mid:.0f}, {high:.0f}':<34}{row['first_epoch_ms']:>11.0f}"
            f"{row['peak_mib']:>10}  {times[1]:.2f} ({times[0]:.2f} to {times[2]:.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
