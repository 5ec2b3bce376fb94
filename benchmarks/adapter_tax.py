"""What adapters cost: the same requests with K distinct adapters and with none.

Regime: one engine, all requests submitted at once, prompts of random tokens, greedy, no early
stop, no prefix cache (every run sends the same prompts). Adapters are random LoReFT of one rank at
f7+l7 in all layers, each used by as many requests as the others. Every repeat runs each K, in an
order of its own, so a machine that slows down slows all of them; ratios are taken within a repeat.
K = 0 is run twice a repeat: the ratio of the second run to the first, ``control``, is what the
machine's noise looks like. Two runs that warm up are not counted. Correctness gate: with adapters,
edits must have been applied, and in float32 tokens with K = 0 must be equal before and after the
others. (In bfloat16 they may differ by which requests shared a step, as that decides how products
round.)

The last line printed is JSON; the same goes to ``results/engine-tax-{dtype}.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from benchmarks.provenance import provenance, save
from benchmarks.spreads import spread_of_ratios
from benchmarks.work import greedy_requests, random_adapter, random_prompts
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import Completion, generate
from reft_core.loading import Dtype, load_model
from reft_core.threads import run_in_own_thread


@dataclass(frozen=True)
class Regime:
    """What is asked of the engine; see the module."""

    model: str = "demo"
    dtype: Dtype = "float32"
    threads: int = 2
    slots: int = 16
    """Requests that run at once."""
    requests: int = 16
    input_tokens: int = 64
    output_tokens: int = 64
    rank: int = 8
    repeats: int = 5
    adapters: tuple[int, ...] = (1, 16)
    """Numbers of distinct adapters, K."""


CONTROL = "control"
"""K = 0 once more."""


def measure(regime: Regime) -> dict[str, dict[str, Any]]:
    """For "K=0", "control" and each other K: tokens/s, and ratios to K = 0 as [smallest, median,
    largest].

    ``throughput_ratio`` is 1 where adapters cost nothing and smaller where they cost something;
    ``token_gap_ratio``, of the time between a request's tokens, is larger.
    """
    loaded = load_model(regime.model, dtype=regime.dtype)
    config = EngineConfig(
        max_model_len=512,
        max_num_seqs=regime.slots,
        prefix_cache_bytes=0,
        num_threads=regime.threads,
    )
    engine = EmbeddedEngine(loaded, config)
    seeds = range(max(regime.adapters))
    digests = run_in_own_thread(lambda: [_load_random(engine, regime.rank, i) for i in seeds])
    prompts = random_prompts(engine.model, regime.requests, regime.input_tokens)

    def run(num_adapters: int) -> tuple[float, list[Completion]]:
        requests = greedy_requests(prompts, regime.output_tokens, digests[:num_adapters])
        started = time.perf_counter()
        completions = generate(engine, requests)
        seconds = time.perf_counter() - started
        if num_adapters and not all(completion.num_edits for completion in completions):
            raise SystemExit("correctness gate: a request's adapter edited nothing")
        return seconds, completions

    engine.start()
    try:
        _, first = run(0)
        run(max(regime.adapters))
        counts = {name_of(0): 0, CONTROL: 0, **{name_of(k): k for k in regime.adapters}}
        seconds: dict[str, list[float]] = {name: [] for name in counts}
        gaps: dict[str, list[float]] = {name: [] for name in counts}
        for repeat in range(regime.repeats):
            for name in random.Random(repeat).sample(list(counts), len(counts)):
                took, completions = run(counts[name])
                seconds[name].append(took)
                times = [c.timings.decode_s for c in completions if c.timings]
                gaps[name].append(median(times) / (regime.output_tokens - 1))
        if regime.dtype == "float32":
            _, last = run(0)
            if [c.token_ids for c in first] != [c.token_ids for c in last]:
                raise SystemExit("correctness gate: the base model's tokens changed during the run")
    finally:
        engine.stop()
    tokens, base = regime.requests * regime.output_tokens, name_of(0)
    return {
        name: {
            "tokens_per_s": round(tokens / median(seconds[name]), 1),
            "throughput_ratio": spread_of_ratios(seconds[base], seconds[name]),
            "token_gap_ratio": spread_of_ratios(gaps[name], gaps[base]),
        }
        for name in counts
    }


def name_of(num_adapters: int) -> str:
    """What the row of so many adapters is called."""
    return f"K={num_adapters}"


def _load_random(engine: EmbeddedEngine, rank: int, seed: int) -> str:
    """The digest of a random adapter that the engine has loaded."""
    adapter = random_adapter(engine.model, rank, seed)
    engine.load_adapter(adapter)
    return adapter.digest


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Regime):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "adapters":
            parser.add_argument(flag, type=int, nargs="+", default=list(Regime.adapters))
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    regime = Regime(**{**options, "adapters": tuple(options["adapters"])})

    table = measure(regime)
    for name, row in table.items():
        print(f"{name:8s} {row}")
    document = {**provenance(), **asdict(regime), "results": table}
    print("saved to", save(f"engine-tax-{regime.dtype}", document))
    summary = {f"tax_{k}": table[name_of(k)]["throughput_ratio"][1] for k in regime.adapters}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
