"""Does it matter how many adapters are registered, and how soon is a cold one usable?

Throughput: one stream of requests, each naming one of ten adapters, through the server's own
path (catalog in SQLite, files on disk, residency, generator, engine; everything but HTTP) with
only those ten registered, and with thousands beside them. A third run has every request name
another adapter, none of them resident. All are LoReFT in all layers at f7+l7; those registered
only to be there are of rank 1 in one layer. Every repeat runs all three in turn, in an order that
alternates, so a machine that slows down slows all of them; ratios are taken within a repeat. A
run that warms up comes first and is not counted. The prefix cache is off: repeats would hit it.
Correctness gate: with ten and with thousands registered, greedy tokens are the same.

Cold loads: from asking residency for an adapter that is on disk until requests may name it. The
engine is idle, with the file in the page cache and (as far as the system heeds the advice) not;
and once more while the engine decodes a full batch.

The last line printed is JSON; the same goes to ``results/engine-residency.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.provenance import provenance, save
from benchmarks.spreads import spread_of_ratios
from benchmarks.work import fresh_adapter, random_prompts
from reft_core.adapter import encode_adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import SamplingParams
from reft_core.grammar import GrammarCompiler
from reft_core.loading import LoadedModel, load_model
from reft_core.sites import ModelDescription
from reft_core.spec import PositionSpec
from server.adapters.residency import Residency
from server.answering.generator import Generator
from server.answering.grammars import Grammars
from server.answering.inline import InlineReader
from server.answering.job import Job
from server.answering.named import Answering, NamedAdapter
from server.observability.logs import configure_logging
from server.observability.metrics import Metrics
from server.registry import Registry

MIX = 10
"""Adapters that the stream of requests draws from."""
MAX_BYTES = 64 * 2**20


def adapter_files(
    model: ModelDescription, rank: int, layers: Sequence[int], seed: int
) -> Iterator[bytes]:
    """Endless LoReFT files at f7+l7 that differ in their numbers, which are small, alone."""
    positions = PositionSpec(rule="f7+l7")
    spec, modules = fresh_adapter(model, "loreft", positions, layers=layers, rank=rank)
    file = encode_adapter(spec, {key: module.to_edit() for key, module in modules.items()})
    header = file[: 8 + int.from_bytes(file[:8], "little")]
    generator = torch.Generator().manual_seed(seed)
    while True:
        numbers = 0.01 * torch.randn(spec.num_parameters, generator=generator)
        yield header + numbers.numpy().tobytes()


def register(folder: Path, model: ModelDescription, files: dict[str, bytes]) -> Registry:
    """A registry of ``files`` in ``folder``, made in memory first, where nothing waits for a disk.

    The files are read anew from ``folder``, so they lie in the page cache at best.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as made:
        registry = Registry.open(Path(made), model, MAX_BYTES)
        for name, file in files.items():
            registry.upload(name, file)
        registry.close()
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return Registry.open(folder, model, MAX_BYTES)


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine in one run."""

    prompts: list[list[int]]
    params: SamplingParams

    async def run(self, generator: Generator, names: Sequence[str]) -> tuple[float, list[str]]:
        """Seconds that all prompts took together, each with its adapter, and the answers."""

        async def ask(prompt: list[int], name: str) -> str:
            answering = Answering(((NamedAdapter(name),),))
            job = Job(answering, lambda *_: [prompt], self.params)
            generation = await generator.start(job)
            try:
                (choice,) = await generation.collect()
                return choice.text
            finally:
                generation.close()

        began_at = time.perf_counter()
        pairs = zip(self.prompts, names, strict=True)
        answers = await asyncio.gather(*(ask(*pair) for pair in pairs))
        return time.perf_counter() - began_at, answers


async def time_loads(
    registry: Registry, residency: Residency, names: Sequence[str], before: Callable[[str], None]
) -> list[float]:
    """Milliseconds from naming each adapter to having it in the engine; it leaves right away."""
    took = []
    for name in names:
        before(name)
        began_at = time.perf_counter()
        version = await asyncio.to_thread(registry.resolve, name)
        assert version is not None
        await residency.acquire(version.digest, version.resident_bytes)
        took.append(1e3 * (time.perf_counter() - began_at))
        residency.release(version.digest)
        residency.forget(version.digest)
    return took


def uncache(folder: Path, registry: Registry) -> Callable[[str], None]:
    """A function that asks the system to drop an adapter's file from the page cache."""

    def drop(name: str) -> None:
        digest = registry.current(name).digest
        (path,) = folder.glob(f"blobs/??/{digest}.*")
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    return drop


def measure(
    loaded: LoadedModel,
    *,
    registered: int = 10_000,
    requests: int = 32,
    input_tokens: int = 64,
    output_tokens: int = 32,
    rank: int = 8,
    repeats: int = 5,
    loads: int = 200,
    threads: int | None = 2,
) -> dict[str, Any]:
    """All of this module's measurements; see its docstring. Takes over the model."""
    config = EngineConfig(max_model_len=512, num_threads=threads, prefix_cache_bytes=0)
    engine = EmbeddedEngine(loaded, config)
    num_cold = max(loads, 3 * requests)
    assert registered > MIX + num_cold, "too few to be registered"
    real = adapter_files(engine.model, rank, range(engine.model.num_layers), seed=0)
    small = adapter_files(engine.model, 1, [0], seed=1)
    hot = {f"hot-{i}": next(real) for i in range(MIX)}
    cold = {f"cold-{i}": next(real) for i in range(num_cold)}
    rest = {f"rest-{i}": next(small) for i in range(registered - MIX - num_cold)}
    with tempfile.TemporaryDirectory() as folder:
        few = register(Path(folder, "few"), engine.model, hot)
        many = register(Path(folder, "many"), engine.model, hot | cold | rest)
        drop = uncache(Path(folder, "many"), many)
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        workload = Workload(random_prompts(engine.model, requests, input_tokens), params)
        bench = _Bench(engine, loaded, few, many, workload, len(cold["cold-0"]))
        engine.start()
        try:
            result = asyncio.run(bench.throughput(list(cold), repeats))
            result["cold_load_ms"] = asyncio.run(bench.cold_loads(list(cold)[:loads], drop))
        finally:
            engine.stop()
        result["resolve_us"] = {
            count: _time_us(partial(registry.resolve, "hot-3"))
            for count, registry in ((MIX, few), (registered, many))
        }
        few.close()
        many.close()
    return result


@dataclass(frozen=True)
class _Bench:
    """An engine with two registries in front of it."""

    engine: EmbeddedEngine
    loaded: LoadedModel
    few: Registry
    many: Registry
    workload: Workload
    file_bytes: int

    def _generator(self, registry: Registry, residency: Residency) -> Generator:
        grammars = Grammars(GrammarCompiler(self.loaded), most=1, timeout_s=1)  # of none is asked
        return Generator(
            self.engine,
            registry,
            residency,
            self.loaded.tokenizer,
            Metrics(),
            grammars,
            InlineReader(self.engine.model, None),
        )

    async def throughput(self, cold: Sequence[str], repeats: int) -> dict[str, Any]:
        """The same requests with few registered, with many, and with all of them cold."""
        num_requests = len(self.workload.prompts)
        mix = [f"hot-{i % MIX}" for i in range(num_requests)]
        others = itertools.cycle(cold)
        room = num_requests * self.file_bytes
        hot = Residency(self.engine, self.many.read, 2**30)
        always_cold = Residency(self.engine, self.many.read, room)
        generators = {
            "few": self._generator(self.few, hot),
            "many": self._generator(self.many, hot),
            "all_cold": self._generator(self.many, always_cold),
        }
        answers: dict[str, list[str]] = {}
        seconds: dict[str, list[float]] = {kind: [] for kind in generators}
        for repeat in range(-1, repeats):
            order = list(generators)[:: 1 if repeat % 2 else -1]
            for kind in order:
                names = [next(others) for _ in mix] if kind == "all_cold" else mix
                took, found = await self.workload.run(generators[kind], names)
                if kind != "all_cold" and answers.setdefault("expected", found) != found:
                    raise SystemExit("correctness gate: other adapters changed the answers")
                if repeat >= 0:
                    seconds[kind].append(took)
        assert always_cold.num_evictions >= num_requests * repeats, "not all were cold"
        num_tokens = num_requests * self.workload.params.max_tokens
        return {
            "tokens_per_s": {k: round(num_tokens / median(s), 1) for k, s in seconds.items()},
            "registered_ratio": spread_of_ratios(seconds["few"], seconds["many"], 4),
            "all_cold_ratio": spread_of_ratios(seconds["few"], seconds["all_cold"], 4),
        }

    async def cold_loads(
        self, names: Sequence[str], drop: Callable[[str], None]
    ) -> dict[str, dict[str, float]]:
        """Times of loading each of ``names`` once, in milliseconds."""
        residency = Residency(self.engine, self.many.read, 2**30)
        generator = self._generator(self.many, residency)

        def read(name: str) -> None:
            self.many.read(self.many.current(name).digest)

        await time_loads(self.many, residency, names[:20], read)
        found = {"cached": await time_loads(self.many, residency, names, read)}
        found["uncached"] = await time_loads(self.many, residency, names, drop)
        room = self.engine.max_model_len - max(map(len, self.workload.prompts))
        long = replace(self.workload, params=replace(self.workload.params, max_tokens=room))
        busy = asyncio.create_task(
            long.run(generator, [f"hot-{i % MIX}" for i in range(len(long.prompts))])
        )
        full = min(len(long.prompts), self.engine.stats().num_slots)
        while self.engine.stats().num_running < full and not busy.done():
            await asyncio.sleep(0.01)
        found["busy"] = await time_loads(self.many, residency, names, read)
        busy.cancel()
        with suppress(asyncio.CancelledError):
            await busy
        return {kind: _spread(times) for kind, times in found.items()}


def _spread(times: Sequence[float]) -> dict[str, float]:
    p95 = quantiles(times, n=20)[-1]
    return {"median": round(median(times), 2), "p95": round(p95, 2), "max": round(max(times), 2)}


def _time_us(function: Callable[[], object], count: int = 500) -> float:
    """Median microseconds of a call."""
    took = []
    for _ in range(count):
        began_at = time.perf_counter()
        function()
        took.append(1e6 * (time.perf_counter() - began_at))
    return round(median(took), 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--registered", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loads", type=int, default=200)
    options = vars(parser.parse_args())
    model, dtype = options.pop("model"), options.pop("dtype")
    configure_logging("warning", "console")

    loaded = load_model(model, dtype=dtype)
    results = measure(loaded, **options)
    for name, value in results.items():
        print(f"{name:18} {value}")
    document = {**provenance(), "model": loaded.description.name, "dtype": dtype, **options}
    print("saved to", save("engine-residency", {**document, "results": results}))
    summary = {
        "registered_10k_ratio": results["registered_ratio"][1],
        "registered_10k_spread": results["registered_ratio"][::2],
        "all_cold_ratio": results["all_cold_ratio"][1],
        **{f"cold_load_{k}_ms": v for k, v in results["cold_load_ms"].items()},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
