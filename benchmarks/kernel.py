"""Ways to apply a place's edits, and how much of a prefill edits take.

Ways, for A adapters of rank r with K rows each in a packed (N, d) tensor:

- compiled: one pass of the compiled loops over all edits (CPU);
- triton: one launch for all edits, out of the adapters' own memory (CUDA with Triton);
- stacked: one bmm over (A, K, d) rows and (A, d, r) stacks, made within the call, as a plan is used
  once a layer;
- loop: two thin products an adapter on its own rows;
- gather: each row multiplied with its own copy of the weights, (K·A, d, r).

All read and write the same rows and must agree. Every repeat runs each way in turn. K is 14 as for
f7+l7, and for a few cells 1 (a decode step of a ``phase: all`` adapter) and 64 (a ``prompt`` rule).
``served`` is the way that the server takes in a cell, and ``why`` says how it compares.

The share of prefill is measured on the served forward in bfloat16, for 16 prompts of 64 tokens with
an adapter each (rank 8, f7+l7, all layers): the time inside ``apply_edits`` over that of the whole
prefill, and what the whole took longer than the one without adapters just before it.

The last line printed is JSON; the same goes to ``results/engine-kernel.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

import reft_core.engine.layer as layer
import reft_core.kernels as kernels
from benchmarks.provenance import provenance, save
from benchmarks.spreads import Spread, spread
from benchmarks.work import random_adapter, random_prompts
from reft_core.batch import AdapterUse, PromptEdits, RowEdit
from reft_core.edits import Edit
from reft_core.engine.interface import Request
from reft_core.engine.kv import SlotKV
from reft_core.engine.runner import ModelRunner
from reft_core.engine.sequence import Sequence
from reft_core.engine.sharing import Chunk
from reft_core.loading import LoadedModel, load_model
from reft_core.native.edits import apply_natively

ROWS = 14
OTHER_ROWS = (1, 64)
OTHER_ROWS_RANK = 8
MAX_GATHER_BYTES = 1 << 30
Way = Callable[[], object]


def ways_of(
    hidden: Tensor, num_adapters: int, num_rows: int, rank: int
) -> tuple[dict[str, Way], Callable[[], Tensor]]:
    """Each way as a call that edits a copy of ``hidden`` (A·K, d), and what it left."""
    size, device = hidden.shape[1], hidden.device
    down = torch.randn(num_adapters, size, rank, device=device) / size**0.5
    up = torch.randn(num_adapters, rank, size, device=device) / rank**0.5
    bias = torch.randn(num_adapters, 1, rank, device=device)
    order = torch.randperm(len(hidden), device=device)
    rows = order.view(num_adapters, num_rows)
    edits = [
        RowEdit(Edit(down=down[i], up=up[i], bias=bias[i, 0]), rows[i], 1.0, depth=0)
        for i in range(num_adapters)
    ]
    apart = [replace(edit, depth=None) for edit in edits]
    state = hidden.clone()
    owner = torch.arange(num_adapters, device=device).repeat_interleave(num_rows)

    def gather() -> None:
        h = state.index_select(0, order).float().unsqueeze(1)  # (N, 1, d)
        inner = torch.bmm(h, down[owner]) + bias[owner]
        state.index_copy_(0, order, (h + torch.bmm(inner, up[owner])).squeeze(1).to(state.dtype))

    def read() -> Tensor:
        result = state.clone()
        state.copy_(hidden)
        return result

    ways: dict[str, Way] = {
        "loop": lambda: kernels.apply_by_torch(state, state, apart),
        "stacked": lambda: kernels.apply_by_torch(state, state, edits, least_stack=1),
    }
    if len(hidden) * size * rank * 4 * 2 <= MAX_GATHER_BYTES:
        ways["gather"] = gather
    if apply_natively(state, edits):
        state.copy_(hidden)
        ways["compiled"] = lambda: apply_natively(state, edits)
    grouped = kernels.grouped_kernel(device)
    if grouped is not None and grouped(state, edits):
        state.copy_(hidden)
        ways["triton"] = lambda: grouped(state, edits)
    return ways, read


@torch.inference_mode()
def compare(hidden: Tensor, num_adapters: int, rank: int, repeats: int) -> dict[str, Spread]:
    """Microseconds of each way on ``hidden`` (A·K, d)."""
    ways, read = ways_of(hidden, num_adapters, len(hidden) // num_adapters, rank)
    expected = None
    for name, way in ways.items():
        way()
        found = read().float()
        expected = found if expected is None else expected
        error = (found - expected).abs().max() / expected.abs().max()
        if not error <= (1e-5 if hidden.dtype == torch.float32 else 1e-2):
            raise SystemExit(f"correctness gate: {name} differs from the loop by {error:.2g}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(_timed(way, hidden.device))
            read()
    return {name: spread([1e6 * t for t in found], 1) for name, found in times.items()}


def served_way(times: dict[str, Spread], num_adapters: int) -> str:
    """Which of the ways the server takes; see ``reft_core/kernels.py``."""
    for way in ("compiled", "triton"):
        if way in times:
            return way
    return "stacked" if num_adapters >= kernels.LEAST_STACK else "loop"


def cell(times: dict[str, Spread], num_adapters: int) -> dict[str, Any]:
    """One cell of the table: the times, the way served, and why."""
    served = served_way(times, num_adapters)
    others = {way: found[1] for way, found in times.items() if way != served}
    best = min(others, key=lambda way: others[way])
    ratio = others[best] / times[served][1]
    return {
        "microseconds_min_median_max": times,
        "served": served,
        "best_other": best,
        "best_other_over_served": round(ratio, 2),
    }


def reasons(table: dict[str, dict[str, Any]]) -> str:
    """Why the server takes the ways it takes, from the table's own numbers."""
    ratios = {name: entry["best_other_over_served"] for name, entry in table.items()}
    slower = {name: ratio for name, ratio in ratios.items() if ratio < 1}
    text = (
        f"the way served is the fastest in {len(ratios) - len(slower)} of {len(ratios)} cells; "
        f"the best other takes {min(ratios.values())} to {max(ratios.values())} of its time, "
        f"median {median(ratios.values()):.2f}"
    )
    return text + (f"; slower in {slower}" if slower else "")


def _timed(way: Way, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def edit_share(loaded: LoadedModel, device: torch.device, repeats: int) -> dict[str, Spread]:
    """Shares of a prefill of 16 prompts with an adapter each: ``inside`` and ``whole``."""
    num_prompts, length = 16, 64
    parameter = next(loaded.model.parameters())
    kv = SlotKV(loaded.description, num_prompts, 128, dtype=parameter.dtype, device=device)
    runner = ModelRunner(loaded, kv)
    adapters = [random_adapter(loaded.description, 8, seed) for seed in range(num_prompts)]
    prompts = random_prompts(loaded.description, num_prompts, length)

    def chunks_of(edited: bool) -> list[Chunk]:
        found = []
        for slot, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            edits = PromptEdits((AdapterUse(adapter.to(device)),), length) if edited else None
            request = Request(str(slot), tuple(prompt))
            sequence = Sequence(request, lambda _: None, edits, frozenset())
            sequence.slot = slot
            found.append(Chunk(sequence, 0, length))
        return found

    inside = 0.0
    real = kernels.apply_edits

    def clocked(*args: Any) -> None:
        nonlocal inside
        inside += _timed(lambda: real(*args), device)

    plain, with_edits = chunks_of(edited=False), chunks_of(edited=True)
    shares: dict[str, list[float]] = {"inside": [], "whole": []}
    try:
        for module in (kernels, layer):
            module.apply_edits = clocked  # type: ignore[attr-defined]
        for repeat in range(repeats + 2):
            base = _timed(lambda: runner.prefill(plain), device)
            inside = 0.0
            edited = _timed(lambda: runner.prefill(with_edits), device)
            if repeat >= 2:  # the first two warm up
                shares["inside"].append(inside / edited)
                shares["whole"].append(edited / base - 1)
    finally:
        for module in (kernels, layer):
            module.apply_edits = real  # type: ignore[attr-defined]
    return {name: spread(found, 4) for name, found in shares.items()}


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=576, help="hidden size of the comparison")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 3, 4, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    loaded = load_model(options.model, dtype="bfloat16", device=device.type)
    share = edit_share(loaded, device, options.repeats)
    print("share of a bfloat16 prefill, 16 adapters of rank 8:", share)
    cells = [(rank, count, ROWS) for rank in options.ranks for count in options.adapters]
    cells += [(OTHER_ROWS_RANK, count, k) for k in OTHER_ROWS for count in options.adapters]
    table: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rank, count, num_rows in cells:
            name = f"{str(dtype).removeprefix('torch.')} r={rank} A={count} K={num_rows}"
            hidden = torch.randn(count * num_rows, options.size, device=device).to(dtype)
            table[name] = cell(compare(hidden, count, rank, options.repeats), count)
            print(f"{name:28} {table[name]}")
    document = {
        **vars(options),
        **provenance(),
        "cells": table,
        "why": reasons(table),
        "prefill_share_min_median_max": share,
    }
    print("saved to", save("engine-kernel", document))
    print(reasons(table))
    print(json.dumps({"edit_share_prefill_bf16": share["inside"][1], "why": reasons(table)}))


if __name__ == "__main__":
    main()
