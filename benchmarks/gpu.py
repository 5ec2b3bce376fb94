"""What the engine does on a GPU: one command, some minutes, nothing to download.

Builds a random Llama of about 1.2 billion parameters in bfloat16 on the device. Gates come first,
on tiny models in float32: tokens of mixed batches, with and without CUDA graphs, must be those of
the engine on the CPU with transformers' own code and one request at a time, which the tests hold
to the slow reference. Then:

- decode: tokens per second by batch size, with CUDA graphs and without, after 128 prompt tokens;
- prefill: prompt tokens per second of 32 prompts of 1,024 tokens, by one kernel over all prompts
  and by the loop over prompts;
- tax: 256 requests (128 tokens in, 64 out) with K distinct adapters, against the same without;
- edits: the ways of ``benchmarks/kernel.py`` at the model's width, in microseconds;
- cold load: milliseconds until ``load_adapter`` returns, and until the adapter is on the device.

Adapters are random LoReFT of rank 8 at f7+l7 in all layers. Prompts are random tokens, all
different; nothing is cached between runs; each first run warms up and is not counted. A part that
fails is reported and leaves the others alone.

Without a GPU it exits with 2. ``--smoke`` runs all of it on a tiny model and on any device, to see
that it runs: its numbers mean nothing and are not saved.

The last line printed is JSON; the same goes to ``results/engine-gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.kernel import compare
from benchmarks.provenance import provenance, save
from benchmarks.spreads import spread_of_ratios
from benchmarks.work import greedy_requests, random_adapter, random_prompts
from reft_core.adapter import Adapter
from reft_core.engine import varlen
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import Completion, generate
from reft_core.engine.interface import Request
from reft_core.loading import LoadedModel
from reft_core.sites import describe_model
from reft_core.threads import run_in_own_thread

RANK = 8
NO_GPU = 2
"""Exit status where there is nothing to measure."""


@dataclass(frozen=True)
class Regime:
    """Sizes of a run."""

    model: dict[str, int]
    dtype: torch.dtype
    slots: int
    batch_sizes: tuple[int, ...]
    decode_tokens: tuple[int, int]
    """Prompt and answer of the decode part."""
    prefill: tuple[int, int]
    """Prompts and tokens of each."""
    tax_requests: int
    tax_tokens: tuple[int, int]
    adapters: tuple[int, ...]
    repeats: int


FULL = Regime(
    model={
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 2048,
    },
    dtype=torch.bfloat16,
    slots=64,
    batch_sizes=(1, 4, 16, 64),
    decode_tokens=(128, 128),
    prefill=(32, 1024),
    tax_requests=256,
    tax_tokens=(128, 64),
    adapters=(1, 16, 64, 256),
    repeats=3,
)
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
SMOKE = Regime(
    model=TINY,
    dtype=torch.float32,
    slots=4,
    batch_sizes=(1, 3),
    decode_tokens=(9, 4),
    prefill=(3, 40),
    tax_requests=6,
    tax_tokens=(20, 3),
    adapters=(1, 3),
    repeats=1,
)


class _NoTokenizer:
    """Stands where a tokenizer would; prompts are token ids."""

    eos_token_id = None


def random_llama(
    sizes: dict[str, int], dtype: torch.dtype, device: torch.device, *, spread: float = 0.02
) -> LoadedModel:
    """A Llama with random weights, made on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, initializer_range=spread, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    tokenizer: PreTrainedTokenizerBase = _NoTokenizer()
    return LoadedModel(model, tokenizer, describe_model(model, "random-llama"))


@contextmanager
def running(loaded: LoadedModel, **config: Any) -> Iterator[EmbeddedEngine]:
    """An engine that is started and stopped, without a prefix cache."""
    engine = EmbeddedEngine(loaded, EngineConfig(prefix_cache_bytes=0, **config))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def work(
    engine: EmbeddedEngine,
    count: int,
    tokens: tuple[int, int],
    adapters: Sequence[Adapter] = (),
    seed: int = 0,
) -> list[Request]:
    """Greedy requests that use the adapters in turn."""
    prompts = random_prompts(engine.model, count, tokens[0], seed)
    return greedy_requests(prompts, tokens[1], [adapter.digest for adapter in adapters])


def timed(run: Callable[[], list[Completion]]) -> tuple[float, list[Completion]]:
    """Seconds of a run, and what it gave."""
    started = time.perf_counter()
    completions = run()
    return time.perf_counter() - started, completions


def adapters_for(loaded: LoadedModel, count: int) -> list[Adapter]:
    """Random adapters, made off this thread."""
    return run_in_own_thread(
        lambda: [random_adapter(loaded.description, RANK, seed) for seed in range(count)]
    )


def gate(device: torch.device) -> dict[str, Any]:
    """Tokens of a mixed batch in float32 on the device, against the CPU one by one."""
    # Wide weights set logits well apart, and make the adapters matter.
    model = random_llama(TINY, torch.float32, torch.device("cpu"), spread=0.3)
    twin = random_llama(TINY, torch.float32, torch.device("cpu"), spread=0.3)
    twin.model.to(device)
    adapters = adapters_for(model, 3)
    found: dict[str, list[list[int]]] = {}

    def tokens_of(name: str, loaded: LoadedModel, **config: Any) -> None:
        with running(loaded, max_model_len=96, **config) as engine:
            for adapter in adapters:
                engine.load_adapter(adapter)
            requests = work(engine, 12, (37, 12), adapters) + work(engine, 4, (9, 12), seed=1)
            found[name] = [completion.token_ids for completion in generate(engine, requests)]

    tokens_of("reference", model, forward="transformers", max_num_seqs=1)
    for forward in ("auto", "transformers"):
        for graphs in (True, False):
            name = f"{forward}, {'graphs' if graphs else 'no graphs'}"
            options = {"max_num_seqs": 5, "max_prefill_tokens": 50, "cuda_graphs": graphs}
            tokens_of(name, twin, forward=forward, **options)
            if found[name] != found["reference"]:
                raise SystemExit(f"correctness gate: {name} gives other tokens than the CPU")
    return {"cells": len(found) - 1, "requests": 16}


def decode(loaded: LoadedModel, regime: Regime) -> dict[str, Any]:
    """Tokens per second by batch size, with graphs and without."""
    table: dict[str, Any] = {}
    tokens: dict[bool, list[list[int]]] = {}
    length = sum(regime.decode_tokens)
    for graphs in (True, False):
        options = {"max_model_len": length, "max_num_seqs": regime.slots, "cuda_graphs": graphs}
        with running(loaded, max_prefill_tokens=8192, **options) as engine:
            name = "graphs" if graphs else "no graphs"
            table[name] = {}
            for size in regime.batch_sizes:
                generate(engine, work(engine, size, regime.decode_tokens))
                steps = []
                for _ in range(regime.repeats):
                    done = generate(engine, work(engine, size, regime.decode_tokens))
                    gaps = [c.timings.decode_s for c in done if c.timings]
                    steps.append(median(gaps) / (regime.decode_tokens[1] - 1))
                step = median(steps)
                table[name][f"B={size}"] = {
                    "step_ms": round(1e3 * step, 3),
                    "tokens_per_s": round(size / step, 1),
                }
                tokens[graphs] = [c.token_ids for c in done]
            stats = engine.stats()
            table[name]["recorded"] = stats.num_decode_graphs
            table[name]["warm_up_s"] = round(stats.warm_up_s, 2)
    with_graphs, without = (list(chain.from_iterable(found)) for found in tokens.values())
    # Padding changes shapes of products, so in bfloat16 close logits may fall either way.
    table["same_tokens"] = round(
        sum(a == b for a, b in zip(with_graphs, without, strict=True)) / len(without), 4
    )
    return table


def prefill(loaded: LoadedModel, regime: Regime) -> dict[str, Any]:
    """Prompt tokens per second, by the one kernel where there is one, and by the loop."""
    count, length = regime.prefill
    table: dict[str, Any] = {}
    real = varlen.serves
    options = {"max_num_seqs": count, "max_prefill_tokens": 8192, "cuda_graphs": False}
    with running(loaded, max_model_len=length + 1, **options) as engine:
        for name in ("at once", "loop"):
            if name == "loop":
                varlen.serves = lambda *_args: False
            try:
                runs = [
                    timed(lambda: generate(engine, work(engine, count, (length, 1))))[0]
                    for _ in range(regime.repeats + 1)
                ]
            finally:
                varlen.serves = real
            table[name] = {"tokens_per_s": round(count * length / median(runs[1:]), 1)}
    return table


def tax(loaded: LoadedModel, regime: Regime, adapters: list[Adapter]) -> dict[str, Any]:
    """Throughput with K adapters over that without, run by run in turn."""
    options = {"max_model_len": sum(regime.tax_tokens), "max_num_seqs": regime.slots}
    counts = (0, *regime.adapters)
    seconds: dict[int, list[float]] = {k: [] for k in counts}
    with running(loaded, max_prefill_tokens=8192, **options) as engine:
        for adapter in adapters:
            engine.load_adapter(adapter)
        for repeat in range(regime.repeats + 1):
            for k in counts:
                requests = work(engine, regime.tax_requests, regime.tax_tokens, adapters[:k])
                took, _ = timed(lambda requests=requests: generate(engine, requests))  # type: ignore[misc]
                if repeat:  # the first warms up
                    seconds[k].append(took)
    generated = regime.tax_requests * regime.tax_tokens[1]
    table: dict[str, Any] = {}
    for k in counts:
        table[f"K={k}"] = {
            "tokens_per_s": round(generated / median(seconds[k]), 1),
            "throughput_ratio": spread_of_ratios(seconds[0], seconds[k]),
        }
    return table


@torch.inference_mode()
def edits(regime: Regime, device: torch.device) -> dict[str, Any]:
    """Microseconds of each way, smallest, median and largest."""
    table: dict[str, Any] = {}
    for rank in (4, RANK, 64):
        for count in regime.adapters:
            hidden = torch.randn(count * 14, regime.model["hidden_size"], device=device)
            name = f"r={rank} A={count} K=14"
            table[name] = compare(hidden.to(regime.dtype), count, rank, 5 * regime.repeats)
    return table


def cold_load(loaded: LoadedModel, adapters: list[Adapter], device: torch.device) -> dict[str, Any]:
    """Milliseconds of bringing an adapter to the device."""
    returned, there = [], []
    with running(loaded, max_model_len=64, max_num_seqs=1, cuda_graphs=False) as engine:
        for adapter in adapters[:20]:
            started = time.perf_counter()
            engine.load_adapter(adapter)
            returned.append(1e3 * (time.perf_counter() - started))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            there.append(1e3 * (time.perf_counter() - started))
    skipped = len(returned) > 1  # the first makes the pinned memory
    return {
        "adapter_bytes": adapters[0].num_bytes,
        "returned_ms": round(median(returned[skipped:]), 3),
        "on_device_ms": round(median(there[skipped:]), 3),
    }


def main() -> int:
    """Run everything and print it; 0 if all parts ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, on any device, not saved")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smoke:
        print("no CUDA device here: there is nothing to measure", file=sys.stderr)
        return NO_GPU
    started = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    regime = SMOKE if options.smoke else FULL
    results: dict[str, Any] = {"gate": gate(device)}
    print("gate:", results["gate"], flush=True)
    loaded = run_in_own_thread(lambda: random_llama(regime.model, regime.dtype, device))
    adapters = adapters_for(loaded, max(regime.adapters))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "decode": lambda: decode(loaded, regime),
        "prefill": lambda: prefill(loaded, regime),
        "tax": lambda: tax(loaded, regime, adapters),
        "edits_us": lambda: edits(regime, device),
        "cold_load": lambda: cold_load(loaded, adapters, device),
    }
    failed = []
    for name, part in parts.items():
        try:
            results[name] = part()
        except Exception as error:  # a part is worth having without the others
            failed.append(name)
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    document: dict[str, object] = {
        "model": {**regime.model, "parameters": loaded.description.num_parameters},
        "dtype": str(regime.dtype).removeprefix("torch."),
        **provenance(),
        "cuda": torch.version.cuda,
        "seconds": round(time.perf_counter() - started, 1),
        "results": results,
    }
    if not options.smoke:
        print("saved to", save("engine-gpu", document))
    print(json.dumps(document))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
