"""What adapters cost inside vLLM: ours through the plugin, and vLLM's own multi-LoRA.

Regime: one machine, a few cores, all requests submitted at once, prompts of random tokens, greedy,
no early stop, no prefix cache (every run sends the same prompts). Our adapters are random LoReFT
at f7+l7 in all layers, vLLM's are random LoRA on the query and value maps of all layers, both of
one rank; K of them are used in turn. Three engines are loaded at once, each in processes of its
own: vLLM as it is installed, with no plugin in sight; vLLM with the plugin, with and without
adapters; vLLM with LoRA enabled. Every repeat runs each, in an order of its own, so a machine that
slows down slows all of them; ratios are taken within a repeat, to the engine without a plugin.
That one is run twice a repeat: the ratio of its second run, ``control``, is what the machine's
noise looks like. LoRA takes several times as long and joins in fewer repeats. A first round that
warms up is not counted.

Sharing: 16 adapters that edit the last token of one prompt of 1,000 (``l1``), one after the other,
on an empty prefix cache. ``shared_prefix_hit_rate`` is what vLLM's own counters say: prompt tokens
found in the cache over prompt tokens asked for, the first adapter's included, which finds nothing.

Correctness gates: adapters change answers; in float32, an engine with the plugin and without
adapters gives the tokens of the one without, and shared prefixes change none. (In bfloat16 tokens
may differ by which requests shared a step, as that decides how products round.)

The last line printed is JSON; the whole goes to ``results/vllm-tax.json``, or
``results/vllm-tax-quick.json`` with ``--quick``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers.contenders import Variant, start, wait_loaded
from benchmarks.peers.environments import VLLM
from benchmarks.peers.plugin import expose_plugin
from benchmarks.peers.protocol import PeerMissing, Worker
from benchmarks.peers.random_lora import RANK
from benchmarks.provenance import provenance, save
from benchmarks.spreads import spread_of_ratios
from benchmarks.work import random_prompts, write_random_adapters
from reft_core.convert.base import base_from_folder
from reft_core.loading import DEMO_MODEL, Dtype, materialise_demo_model
from reft_core.sites import ModelDescription

_RUN_S = 900.0
_SHARERS = 16
_SHARED_TOKENS = 1000
_SHARED_BLOCK = 32
"""Tokens of a block: the least that vLLM's attention takes on a CPU."""

BASE, CONTROL, IDLE = "base", "control", "plugin_idle"


@dataclass(frozen=True)
class Regime:
    """What is asked of vLLM; see the module."""

    model: str = DEMO_MODEL
    dtype: Dtype = "bfloat16"
    threads: int = 2
    requests: int = 64
    input_tokens: int = 64
    output_tokens: int = 32
    repeats: int = 9
    lora_repeats: int = 3
    """The first so many repeats have LoRA in them."""
    adapters: tuple[int, ...] = (1, 16, 64)
    """Numbers of distinct adapters, K."""
    eager: bool = False
    """Whether vLLM runs without compiling the model."""


QUICK = {"requests": 16, "output_tokens": 8, "repeats": 2, "lora_repeats": 1, "eager": True}
"""What ``--quick`` changes."""


@dataclass(frozen=True)
class Contender:
    """One row: an engine, and how many adapters its requests use in turn."""

    name: str
    engine: str
    num_adapters: int


def contenders(counts: Sequence[int]) -> list[Contender]:
    """The rows, those of LoRA last."""
    return [
        Contender(BASE, BASE, 0),
        Contender(CONTROL, BASE, 0),
        Contender(IDLE, "plugin", 0),
        *(Contender(f"tax_{k}", "plugin", k) for k in counts),
        *(Contender(f"multilora_{k}", "lora", k) for k in counts),
    ]


def variants(regime: Regime, scratch: Path) -> dict[str, Variant]:
    """The engines, in the order in which they are loaded; ``scratch`` has the adapters."""
    most, how = max(regime.adapters), {"eager": regime.eager}
    lora = {"max_loras": most, "num_adapters": most, "folder": str(scratch / "lora")}
    return {
        BASE: Variant("vllm", "base", "benchmarks.peers.vllm_worker", VLLM, how),
        "plugin": plugin_variant("plugin", scratch, "reft", how),
        "lora": Variant("vllm", "lora", "benchmarks.peers.vllm_worker", VLLM, {**how, **lora}),
    }


def plugin_variant(
    label: str, scratch: Path, adapters: str, settings: Mapping[str, Any]
) -> Variant:
    """vLLM with the plugin and the adapter files of a folder of ``scratch``."""
    load = {**settings, "folder": str(scratch / adapters)}
    module = "benchmarks.peers.vllm_reft_worker"
    return Variant("vllm", label, module, VLLM, load, plugins=scratch / "plugin")


def interleave(
    rows: Sequence[Contender],
    run: Callable[[Contender], float],
    repeats: int,
    lora_repeats: int,
) -> dict[str, dict[int, float]]:
    """By row, the seconds of each repeat that it took part in."""
    seconds: dict[str, dict[int, float]] = {row.name: {} for row in rows}
    for repeat in range(repeats):
        present = [row for row in rows if row.engine != "lora" or repeat < lora_repeats]
        for row in random.Random(repeat).sample(present, len(present)):
            seconds[row.name][repeat] = run(row)
    return seconds


def measure_tax(
    regime: Regime, folder: Path, model: ModelDescription, scratch: Path
) -> dict[str, Any]:
    """By row: tokens/s, and throughput over that of the engine without a plugin, paired by repeat
    as [smallest, median, largest]; ``missing`` says why an engine is not there, ``versions`` what
    the others are.
    """
    prompts = random_prompts(model, regime.requests, regime.input_tokens)
    missing: dict[str, str] = {}
    versions: dict[str, Mapping[str, str]] = {}
    workers: dict[str, Worker] = {}
    answers: dict[str, list[list[int]]] = {}
    with ExitStack() as stack:
        for name, variant in variants(regime, scratch).items():
            try:
                worker = start(variant, folder, regime.model, regime.dtype, regime.threads)
                workers[name] = stack.enter_context(worker)
                versions[name] = wait_loaded(worker)["versions"]
                print(f"{name}: {versions[name]}", flush=True)
            except PeerMissing as error:
                workers.pop(name, None)
                missing[name] = str(error)
        rows = [row for row in contenders(regime.adapters) if row.engine in workers]
        if BASE in missing:
            return {"missing": missing}

        def run(row: Contender) -> float:
            answer = workers[row.engine].ask(
                "run",
                _RUN_S,
                prompts=prompts,
                output_tokens=regime.output_tokens,
                settings={},
                adapters=row.num_adapters,
            )
            answers[row.name] = answer["tokens"]
            return float(answer["seconds"])

        for row in rows:
            run(row)
        _check_answers(answers, is_exact=regime.dtype == "float32")
        seconds = interleave(rows, run, regime.repeats, regime.lora_repeats)
    tokens = regime.requests * regime.output_tokens
    table = {
        row.name: {
            "tokens_per_s": round(tokens / median(seconds[row.name].values()), 1),
            "throughput_ratio": _ratio(seconds[BASE], seconds[row.name]),
            "answers_changed": _num_different(answers[BASE], answers[row.name]),
        }
        for row in rows
        if seconds[row.name]
    }
    return {**table, "missing": missing, "versions": versions}


def _ratio(base: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    return spread_of_ratios([base[repeat] for repeat in other], list(other.values()))


def _check_answers(answers: Mapping[str, Sequence[Sequence[int]]], *, is_exact: bool) -> None:
    """The gates on tokens; raises SystemExit."""
    for name, tokens in answers.items():
        changed = _num_different(answers[BASE], tokens)
        if is_exact and name in (CONTROL, IDLE) and changed:
            raise SystemExit(f"correctness gate: {name} changed {changed} answers of the base")
        if name.startswith("tax_") and not changed:
            raise SystemExit(f"correctness gate: {name}: no adapter changed an answer")


def _num_different(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    return sum(list(a) != list(b) for a, b in zip(some, others, strict=True))


def measure_sharing(
    regime: Regime, folder: Path, model: ModelDescription, scratch: Path
) -> dict[str, Any]:
    """The share of prompt tokens that the prefix cache had."""
    engine = {
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "block_size": _SHARED_BLOCK,
        "max_model_len": _SHARED_TOKENS + _SHARED_BLOCK,
    }
    settings = {"eager": regime.eager, "engine": engine}
    variant = plugin_variant("sharing", scratch, "l1", settings)
    [prompt] = random_prompts(model, 1, _SHARED_TOKENS, seed=1)
    with start(variant, folder, regime.model, "float32", regime.threads) as worker:
        wait_loaded(worker)
        found = worker.ask("share", _RUN_S, prompt=prompt, output_tokens=8, adapters=_SHARERS)
    shared, apart, base = (found[name] for name in ("shared", "apart", "base"))
    if shared != apart:
        different = _num_different(apart, shared)
        raise SystemExit(f"correctness gate: a shared prefix changed {different} answers")
    if all(answer == base for answer in apart):
        raise SystemExit("correctness gate: no adapter of the last token changed an answer")
    return {
        "hits": found["hits"],
        "queries": found["queries"],
        "hit_rate": round(found["hits"] / found["queries"], 4),
        "adapters": _SHARERS,
        "prompt_tokens": _SHARED_TOKENS,
        "block_tokens": _SHARED_BLOCK,
        "answers_of_their_own": _num_different([base] * _SHARERS, apart),
    }


def summary(regime: Regime, tax: Mapping[str, Any], sharing: Mapping[str, Any]) -> dict[str, Any]:
    """The medians under the names of the last line; None where something is missing."""
    names = [IDLE, *(f"tax_{k}" for k in regime.adapters), f"multilora_{max(regime.adapters)}"]
    figures = {name: tax[name]["throughput_ratio"][1] if name in tax else None for name in names}
    return {**figures, "shared_prefix_hit_rate": sharing.get("hit_rate")}


def main() -> None:
    """Run both measurements and print them."""
    regime, is_quick = _read_options()
    folder = materialise_demo_model() if regime.model == DEMO_MODEL else Path(regime.model)
    model = base_from_folder(regime.model)
    with TemporaryDirectory() as name:
        scratch = Path(name)
        expose_plugin(scratch / "plugin")
        write_random_adapters(scratch / "reft", model, RANK, max(regime.adapters))
        write_random_adapters(scratch / "l1", model, RANK, _SHARERS, rule="l1")
        tax = measure_tax(regime, folder, model, scratch)
        for row, values in tax.items():
            print(f"{row:14s} {values}", flush=True)
        try:
            sharing = measure_sharing(regime, folder, model, scratch)
        except PeerMissing as error:
            sharing = {"missing": str(error)}
        print(f"{'sharing':14s} {sharing}")
    figures = summary(regime, tax, sharing)
    document = {**provenance(), **asdict(regime), "rank": RANK, "summary": figures}
    name = "vllm-tax-quick" if is_quick else "vllm-tax"
    print("saved to", save(name, {**document, "tax": tax, "sharing": sharing}))
    print(json.dumps(figures))


def _read_options() -> tuple[Regime, bool]:
    """What is asked for, and whether it is the quick version of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two minutes of it, to see it work")
    for field in fields(Regime):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "adapters":
            parser.add_argument(flag, type=int, nargs="+")
        elif field.name == "eager":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(flag, type=type(field.default))
    options = {
        name: value for name, value in vars(parser.parse_args()).items() if value is not None
    }
    is_quick = options.pop("quick")
    if is_quick:
        options = {**QUICK, **options}
    if "adapters" in options:
        options["adapters"] = tuple(options["adapters"])
    return replace(Regime(), **options), is_quick


if __name__ == "__main__":
    main()
