"""Ways to apply a place's edits, and how much of a prefill edits take.

Ways, for A adapters of rank r with 14 rows each (f7+l7) in a packed (N, d) tensor:

- loop: two thin products an adapter on its own rows;
- stacked: one bmm over (A, 14, d) rows and (A, d, r) stacks, which are made once and not timed;
- served: what the server runs. It stacks within each call, as a plan is used once a layer, from
  three adapters on, and loops below;
- gather: each row multiplied with its own copy of the weights, (14·A, d, r).

All read and write the same rows and must agree. Every repeat runs each way in turn. The share
of prefill is the time inside ``apply_edits`` over that of the whole packed forward, for 16
prompts with an adapter each (rank 8, f7+l7, all layers), against the same forward without.

The last line printed is JSON; the same goes to ``results/kernel.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

import reft_core.kernels as kernels
from benchmarks.adapter_tax import random_adapter
from benchmarks.provenance import provenance, save
from reft_core.batch import AdapterUse, PackedChunk, PromptEdits, RowEdit, build_plan
from reft_core.edits import Edit
from reft_core.loading import load_model
from reft_core.sites import find_layers

ROWS = 14
MAX_GATHER_BYTES = 1 << 30
Way = Callable[[], None]


def ways_of(
    hidden: Tensor, num_adapters: int, rank: int, device: torch.device
) -> tuple[dict[str, Way], Callable[[], Tensor]]:
    """Each way as a call that edits a copy of ``hidden`` (A·14, d), and what it left."""
    size = hidden.shape[1]
    down = torch.randn(num_adapters, size, rank, device=device) / size**0.5
    up = torch.randn(num_adapters, rank, size, device=device) / rank**0.5
    bias = torch.randn(num_adapters, 1, rank, device=device)
    order = torch.randperm(len(hidden), device=device)
    rows = order.view(num_adapters, ROWS)
    edits = [
        RowEdit(Edit(down=down[i], up=up[i], bias=bias[i, 0]), rows[i], 1.0)
        for i in range(num_adapters)
    ]
    state = hidden.clone()
    owner = torch.arange(num_adapters, device=device).repeat_interleave(ROWS)

    together = [replace(edit, depth=0) for edit in edits]

    def loop() -> None:
        kernels.apply_edits(state, state, edits)

    def served() -> None:
        kernels.apply_edits(state, state, together)

    def stacked() -> None:
        h = state.index_select(0, order).float().view(num_adapters, ROWS, size)
        edited = torch.baddbmm(h, torch.baddbmm(bias, h, down), up)
        state.index_copy_(0, order, edited.view(-1, size).to(state.dtype))

    def gather() -> None:
        h = state.index_select(0, order).float().unsqueeze(1)  # (K, 1, d)
        inner = torch.bmm(h, down[owner]) + bias[owner]
        state.index_copy_(0, order, (h + torch.bmm(inner, up[owner])).squeeze(1).to(state.dtype))

    def read() -> Tensor:
        result = state.clone()
        state.copy_(hidden)
        return result

    ways = {"loop": loop, "stacked": stacked, "served": served}
    if len(hidden) * size * rank * 4 * 2 <= MAX_GATHER_BYTES:
        ways["gather"] = gather
    return ways, read


@torch.inference_mode()
def compare(
    num_adapters: int, rank: int, size: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Microseconds of each way: smallest, median and largest over the repeats."""
    hidden = torch.randn(num_adapters * ROWS, size, device=device).to(dtype)
    ways, read = ways_of(hidden, num_adapters, rank, device)
    expected = None
    for name, way in ways.items():
        way()
        found = read().float()
        expected = found if expected is None else expected
        error = (found - expected).abs().max() / expected.abs().max()
        if not error <= (1e-5 if dtype == torch.float32 else 1e-2):
            raise SystemExit(f"correctness gate: {name} differs from the loop by {error:.2g}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(_timed(way, device))
            read()
    return {
        name: [round(1e6 * t, 1) for t in (min(found), median(found), max(found))]
        for name, found in times.items()
    }


def _timed(way: Way, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def edit_share(model: str, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Shares of a bfloat16 prefill: [smallest, median, largest] of the repeats.

    ``inside``: time in ``apply_edits`` over that of the forward. ``whole``: what the forward
    with edits took longer than the one without just before it, hooks included.
    """
    loaded = load_model(model, dtype="bfloat16", device=device.type)
    description, num_prompts, length = loaded.description, 16, 64
    uses = [AdapterUse(random_adapter(description, 8, seed)) for seed in range(num_prompts)]
    chunks = [
        PackedChunk(i * length, 0, length, PromptEdits((use,), length))
        for i, use in enumerate(uses)
    ]
    plan = build_plan(chunks, device)
    layers = find_layers(loaded.model)
    tokens = torch.randint(3, description.vocab_size, (num_prompts, length), device=device)
    apply_edits = kernels.apply_edits
    inside = 0.0

    def clocked(*args: object) -> None:
        nonlocal inside
        started = time.perf_counter()
        apply_edits(*args)  # type: ignore[arg-type]
        inside += time.perf_counter() - started

    def forward() -> None:
        loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1)

    def edited_forward() -> None:
        with kernels.edited(layers, plan):
            forward()

    kernels.apply_edits = clocked  # type: ignore[assignment]
    shares: dict[str, list[float]] = {"inside": [], "whole": []}
    try:
        for repeat in range(repeats + 2):
            plain, inside = _timed(forward, device), 0.0
            with_edits = _timed(edited_forward, device)
            if repeat >= 2:  # the first two warm up
                shares["inside"].append(inside / with_edits)
                shares["whole"].append(with_edits / plain - 1)
    finally:
        kernels.apply_edits = apply_edits
    return {
        name: [round(s, 4) for s in (min(found), median(found), max(found))]
        for name, found in shares.items()
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=576, help="hidden size of the comparison")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    share = edit_share(options.model, device, options.repeats)
    print("share of a bfloat16 prefill, 16 adapters of rank 8:", share)
    table: dict[str, dict[str, list[float]]] = {}
    fastest: dict[str, str] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rank in options.ranks:
            for count in options.adapters:
                name = f"{str(dtype).removeprefix('torch.')} r={rank} A={count}"
                table[name] = compare(count, rank, options.size, dtype, device, options.repeats)
                fastest[name] = min(table[name], key=lambda way: table[name][way][1])
                print(f"{name:24} {fastest[name]:8} {table[name]}")
    document = {
        "model": options.model,
        **vars(options),
        **provenance(),
        "microseconds_min_median_max": table,
        "fastest": fastest,
        "prefill_share_min_median_max": share,
    }
    print("saved to", save("kernel", document))
    wins = dict(Counter(fastest.values()))
    print(json.dumps({"edit_share_prefill_bf16": share["inside"][1], "fastest": wins}))


if __name__ == "__main__":
    main()
