"""What one prompt under k adapters costs, against the same prompt under one of them.

- suffix: every layer edited at l7. All but the last 7 tokens are computed once, whatever k is.
- upper: f7+l7 from the middle layer on. The layers up to it are computed once.
- all: f7+l7 in every layer. Only the first layer can be shared, so this is near k times one.

Regime: one engine, LoReFT of one rank, k requests submitted together, a fresh prompt of random
tokens for each measurement, one token each. Seconds are from submission to the last request's
token. Every repeat runs each k in turn; ratios are taken within a repeat, after a warm-up.
``rows`` is the same ratio in rows times layers computed, which no implementation goes below
without computing something else. Correctness gate: tokens are those of requests that may share
nothing (by float32's; in bfloat16 the share that agrees is reported).

The last line printed is JSON; the same goes to ``results/engine-fanout-{dtype}.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from benchmarks.provenance import provenance, save
from benchmarks.spreads import spread_of_ratios
from benchmarks.work import random_adapter
from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Output, Request, SamplingParams
from reft_core.loading import load_model
from reft_core.sites import ModelDescription
from reft_core.threads import run_in_own_thread

COUNTS = (1, 2, 4, 16)
CASES = ("suffix", "upper", "all")
_GATE_TOKENS = 8
_GATE_ADAPTERS = 4

_ids = itertools.count()


@dataclass(frozen=True)
class Case:
    """Where the adapters of a comparison edit."""

    name: str
    rule: str
    first_layer: int

    def adapters(self, model: ModelDescription, rank: int) -> list[Adapter]:
        """As many as are ever used at once."""
        seeds = range(max(COUNTS))
        return [random_adapter(model, rank, seed, self.rule, self.first_layer) for seed in seeds]

    def row_ratio(self, num_adapters: int, num_tokens: int, num_layers: int) -> float:
        """Rows times layers computed for so many adapters, over those for one."""
        own = 7 if self.rule == "l7" else num_tokens
        trunk = self.first_layer + 1
        more = own * (num_layers - trunk) * (num_adapters - 1)
        return 1 + more / (num_tokens * num_layers)


def cases(model: ModelDescription) -> list[Case]:
    """The three comparisons."""
    middle = model.num_layers // 2
    return [Case("suffix", "l7", 0), Case("upper", "f7+l7", middle), Case("all", "f7+l7", 0)]


class Bench:
    """One engine and the prompts that it gets."""

    def __init__(self, engine: EmbeddedEngine, num_tokens: int) -> None:
        self._engine = engine
        self._num_tokens = num_tokens
        self._generator = torch.Generator().manual_seed(0)

    def prompt(self) -> tuple[int, ...]:
        """One that was never used."""
        shape, size = (self._num_tokens,), self._engine.model.vocab_size
        return tuple(torch.randint(3, size, shape, generator=self._generator).tolist())

    def run(
        self, adapters: Sequence[Adapter], prompt: tuple[int, ...], max_tokens: int, *, apart: bool
    ) -> list[list[int]]:
        """Every adapter's answer; ``apart`` keeps the requests from sharing anything."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        answers: dict[str, list[int]] = {}
        with self._engine.together():
            for adapter in adapters:
                name = f"fanout-{next(_ids)}"
                answers[name] = []
                choices = (AdapterChoice(adapter.digest),)
                tenant = name if apart else ""
                request = Request(name, prompt, params, choices, tenant=tenant)
                self._engine.submit(request, outputs.put)
        num_open = len(answers)
        while num_open:
            output = outputs.get()
            if output.error is not None:
                raise output.error
            if output.token is not None:
                answers[output.request_id].append(output.token.token_id)
            num_open -= output.finish_reason is not None
        return list(answers.values())

    def seconds(self, adapters: Sequence[Adapter]) -> float:
        """From submission to the last adapter's first token."""
        prompt = self.prompt()
        started = time.perf_counter()
        self.run(adapters, prompt, 1, apart=False)
        return time.perf_counter() - started

    def agreement(self, adapters: Sequence[Adapter]) -> float:
        """Share of answers that are the same whether or not anything is shared."""
        prompt = self.prompt()
        shared, apart = (
            self.run(adapters, prompt, _GATE_TOKENS, apart=apart) for apart in (False, True)
        )
        return sum(a == b for a, b in zip(shared, apart, strict=True)) / len(adapters)


def main() -> None:
    """Run the comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--input-tokens", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    options = parser.parse_args()

    loaded = load_model(options.model, dtype=options.dtype)
    config = EngineConfig(
        max_model_len=options.input_tokens + 24, max_num_seqs=16, num_threads=options.threads
    )
    engine = EmbeddedEngine(loaded, config)
    model, bench = engine.model, Bench(engine, options.input_tokens)
    engine.start()
    table: dict[str, dict[str, object]] = {}
    summary: dict[str, float] = {}
    for case in (case for case in cases(model) if case.name in options.cases):
        adapters = run_in_own_thread(partial(case.adapters, model, options.rank))
        for adapter in adapters:
            engine.load_adapter(adapter)
        bench.seconds(adapters[:2])
        agreement = bench.agreement(adapters[:_GATE_ADAPTERS])
        if options.dtype == "float32" and agreement < 1:
            raise SystemExit(f"correctness gate: {case.name}: sharing changed an answer")
        seconds: dict[int, list[float]] = {k: [] for k in COUNTS}
        for _ in range(options.repeats):
            for k in COUNTS:
                seconds[k].append(bench.seconds(adapters[:k]))
        for k in COUNTS:
            row = {
                "seconds": round(median(seconds[k]), 3),
                "ratio": spread_of_ratios(seconds[k], seconds[1]),
                "rows": round(case.row_ratio(k, options.input_tokens, model.num_layers), 3),
            }
            table[f"{case.name} k={k}"] = {**row, "agreement": agreement}
            print(f"{case.name:7s} k={k:3d}  {row}")
        name = "fanout_16" if case.name == "suffix" else f"fanout_16_{case.name}"
        summary[name] = table[f"{case.name} k=16"]["ratio"][1]  # type: ignore[index]
        for adapter in adapters:
            engine.unload_adapter(adapter.digest)
    engine.stop()
    document = {**provenance(), **vars(options), "model": model.name, "results": table}
    print("saved to", save(f"engine-fanout-{options.dtype}", document))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
