"""What each way to compute the model brings: a decode step and a prefill under every ``forward``.

- transformers: the model's own code, over the engine's slots;
- torch: weights packed by oneDNN; query, key and value, and gate and up, in one product each;
- auto: compiled loops for all of it, whole layers by one call.

Regime: one model, one KV store, B sequences with a context of 128 tokens a decode step; prompts of
random tokens. Every repeat runs each way in turn; the first two warm up. Correctness gate: float32
logits agree within 1e-3 of their largest value.

The last line printed is JSON; the same goes to ``results/engine-forward-{dtype}.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from benchmarks.provenance import provenance, save
from benchmarks.spreads import spread
from benchmarks.work import random_prompts
from reft_core.engine.config import Forward
from reft_core.engine.interface import Request
from reft_core.engine.kv import SlotKV
from reft_core.engine.runner import ModelRunner
from reft_core.engine.sequence import Sequence
from reft_core.engine.sharing import Chunk
from reft_core.loading import load_model
from reft_core.sites import ModelDescription

CONTEXT = 128
PROMPTS = ((16, 64), (1, 1000))
"""Number and length of the prompts of a prefill."""


def sequences(num: int, length: int, model: ModelDescription) -> list[Sequence]:
    """Requests with random prompts, each in its slot."""
    made = []
    for slot, prompt in enumerate(random_prompts(model, num, length)):
        sequence = Sequence(Request(str(slot), tuple(prompt)), lambda _: None, None, frozenset())
        sequence.slot = slot
        made.append(sequence)
    return made


def cases(runner: ModelRunner, model: ModelDescription) -> dict[str, Callable[[], Tensor]]:
    """Each measured call by name; all return logits."""
    found: dict[str, Callable[[], Tensor]] = {}
    for batch in (1, 16):
        running = sequences(batch, CONTEXT, model)
        runner.prefill([Chunk(sequence, 0, CONTEXT) for sequence in running])
        for sequence in running:
            sequence.num_computed = CONTEXT
            sequence.token_ids.append(7)
        found[f"decode B={batch}"] = lambda running=running: runner.decode(running)  # type: ignore[misc]
    for num, length in PROMPTS:
        chunks = [Chunk(s, 0, length) for s in sequences(num, length, model)]
        found[f"prefill {num}x{length}"] = lambda chunks=chunks: runner.prefill(chunks).next  # type: ignore[misc]
    return found


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, dtype=options.dtype)
    dtype = getattr(torch, options.dtype)
    ways: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for forward in get_args(Forward)[::-1]:
        kv = SlotKV(loaded.description, 16, 1024, dtype=dtype, device="cpu")
        runner = ModelRunner(loaded, kv, forward)
        ways[forward] = cases(runner, loaded.description)
    times: dict[str, dict[str, list[float]]] = {case: {} for case in ways["auto"]}
    for case, by_forward in times.items():
        logits = {forward: ways[forward][case]() for forward in ways}
        for forward in ways:
            error = (logits[forward] - logits["transformers"]).abs().max()
            if options.dtype == "float32" and error > 1e-3 * logits["transformers"].abs().max():
                raise SystemExit(f"correctness gate: {forward} differs by {error:.2g} in {case}")
            by_forward[forward] = []
        for repeat in range(options.repeats + 2):
            for forward in ways:
                started = time.perf_counter()
                ways[forward][case]()
                if repeat >= 2:
                    by_forward[forward].append(1e3 * (time.perf_counter() - started))
    table = {
        case: {forward: spread(found, 2) for forward, found in by_forward.items()}
        for case, by_forward in times.items()
    }
    for case, row in table.items():
        print(f"{case:16} milliseconds, min median max: {row}")
    document = {**vars(options), **provenance(), "milliseconds_min_median_max": table}
    print("saved to", save(f"engine-forward-{options.dtype}", document))
    print(json.dumps({case: {f: v[1] for f, v in row.items()} for case, row in table.items()}))


if __name__ == "__main__":
    main()
