"""What adapters cost: the same requests with K distinct adapters and with none.

Regime: one engine, all requests submitted at once, prompts of random tokens, greedy, no early
stop. Adapters are random LoReFT of one rank at f7+l7 in all layers, each used by as many
requests as the others. Every repeat runs each K in turn, so a machine that slows down slows
all of them; ratios are taken within a repeat. A run that warms up comes first and is not
counted. Correctness gate: with K = 0 before and after the others, tokens must be equal.

The last line printed is JSON; the same goes to ``results/adapter-tax-{dtype}.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch

from benchmarks.provenance import provenance, save
from reft_core.adapter import Adapter, decode_adapter, encode_adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import Completion, generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.loading import load_model
from reft_core.methods.placement import Placement
from reft_core.sites import ModelDescription
from reft_core.spec import AdapterSpec, PositionSpec
from reft_core.threads import run_in_own_thread


def random_adapter(
    model: ModelDescription, rank: int, seed: int, rule: str = "f7+l7", first_layer: int = 0
) -> Adapter:
    """A LoReFT adapter in all layers from one on, whose edits are small but not zero."""
    torch.manual_seed(seed)
    layers = tuple(range(first_layer, model.num_layers))
    placement = Placement.on(model, "loreft", layers=layers, rank=rank)
    modules = placement.build(num_units=1)
    for module in modules.values():
        for parameter in module.parameters():
            parameter.data.add_(0.01 * torch.randn_like(parameter) / model.hidden_size**0.5)
    spec = AdapterSpec(
        name=f"random-{seed}",
        base=model.to_base_spec(),
        method="loreft",
        positions=PositionSpec(rule=rule),
        sites=placement.site_specs(),
    )
    edits = {key: module.to_edit() for key, module in modules.items()}
    return decode_adapter(encode_adapter(spec, edits))


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()

    loaded = load_model(options.model, dtype=options.dtype)
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=512, num_threads=options.threads))
    seeds = range(max(options.adapters))
    adapters = run_in_own_thread(
        lambda: [random_adapter(engine.model, options.rank, seed) for seed in seeds]
    )
    for adapter in adapters:
        engine.load_adapter(adapter)
    generator = torch.Generator().manual_seed(0)
    shape = (options.requests, options.input_tokens)
    prompts = torch.randint(3, engine.model.vocab_size, shape, generator=generator).tolist()
    params = SamplingParams(max_tokens=options.output_tokens, temperature=0, ignore_eos=True)

    def run(num_adapters: int) -> tuple[float, list[Completion]]:
        requests = [
            Request(
                f"{time.monotonic_ns()}-{i}",
                tuple(prompt),
                params,
                (AdapterChoice(adapters[i % num_adapters].digest),) if num_adapters else (),
            )
            for i, prompt in enumerate(prompts)
        ]
        started = time.perf_counter()
        completions = generate(engine, requests)
        return time.perf_counter() - started, completions

    engine.start()
    _, first = run(0)
    run(max(options.adapters))
    counts = [0, *options.adapters]
    seconds: dict[int, list[float]] = {k: [] for k in counts}
    decode: dict[int, list[float]] = {k: [] for k in counts}
    for _ in range(options.repeats):
        for k in counts:
            took, completions = run(k)
            seconds[k].append(took)
            times = [c.timings.decode_s for c in completions if c.timings]
            decode[k].append(median(times) / (options.output_tokens - 1))
    _, last = run(0)
    engine.stop()
    if [c.token_ids for c in first] != [c.token_ids for c in last]:
        raise SystemExit("correctness gate: the base model's tokens changed during the run")

    tokens = options.requests * options.output_tokens
    table = {}
    for k in counts:
        ratios = sorted(base / own for base, own in zip(seconds[0], seconds[k], strict=True))
        gaps = sorted(own / base for base, own in zip(decode[0], decode[k], strict=True))
        table[f"K={k}"] = {
            "tokens_per_s": round(tokens / median(seconds[k]), 1),
            "throughput_ratio": [round(r, 3) for r in (ratios[0], median(ratios), ratios[-1])],
            "token_gap_ratio": [round(r, 3) for r in (gaps[0], median(gaps), gaps[-1])],
        }
        print(f"K={k:4d}  {table[f'K={k}']}")
    document = {"model": engine.model.name, **vars(options), **provenance(), "results": table}
    print("saved to", save(f"adapter-tax-{options.dtype}", document))
    summary = {f"tax_{k}": table[f"K={k}"]["throughput_ratio"][1] for k in options.adapters}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
