"""One load run from start to summary."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load.overhead import Target, measure_overhead
from benchmarks.load.questions import Question, make_questions
from benchmarks.soak.audit import find_leaks, wait_for_rest
from benchmarks.soak.oracle import Oracle
from benchmarks.soak.server import ServerProcess
from benchmarks.soak.world import TINY, World, make_world
from reft_core.engine.engine import EmbeddedEngine
from server.settings import Settings

_MAX_LEN = 256
_ANSWER_TOKENS = 24
_DECODES_TOO = "lora"
"""Its edits of generated tokens slow the engine down, and would make HTTP look cheap."""


@dataclass(frozen=True)
class Options:
    """How long and how hard."""

    model: str = "demo"
    seconds: float = 600.0
    connections: int = 1000
    streams: int = 64
    repeats: int = 5
    """Pairs of turns that compare HTTP with the engine; 0 leaves that out."""
    num_files: int = 8
    num_prompts: int = 6
    seed: int = 0


def run(options: Options) -> dict[str, Any]:
    """The summary; it passed if ``lost``, ``wrong_adapter`` and ``leaks`` are empty."""
    with tempfile.TemporaryDirectory(prefix="reft-load-") as made:
        folder = Path(made)
        world = make_world(options.model, folder, options.num_files, options.seed)
        digests = list(world.adapters)
        names = {digest: f"adapter-{i}" for i, digest in enumerate(digests)}
        questions = _questions(options, world, names)
        admin_key = secrets.token_urlsafe(24)
        settings = _settings(world, admin_key)
        process = ServerProcess(world.model, folder, settings)
        try:
            url = process.wait_ready()
            files = dict(zip(digests, [*world.plain, *world.prefixed], strict=True))
            _register(url, admin_key, names, files)
            summary = _crowd(options, url, questions)
            leaks = asyncio.run(_leaks(url))
            if options.repeats:
                summary |= _overhead(options, world, process, url, names, settings)
            status = process.stop()
            leaks += [f"exit status {status}"] if status else []
            leaks += [f"logged error: {error}" for error in process.errors()]
        finally:
            process.kill()
    return {**summary, "leaks": leaks}


def _questions(options: Options, world: World, names: Mapping[str, str]) -> list[Question]:
    """What is asked, with the answers of an engine of its own."""
    oracle = Oracle(world.loaded, world.adapters, _ANSWER_TOKENS, _MAX_LEN)
    oracle.start()
    try:
        return make_questions(
            oracle,
            world.loaded.tokenizer,
            world.loaded.description.name,
            names,
            num_prompts=options.num_prompts,
            max_tokens=_ANSWER_TOKENS,
            seed=options.seed,
        )
    finally:
        oracle.finish()


def _settings(world: World, admin_key: str) -> dict[str, Any]:
    """The server's defaults, but for the sizes, as many slots as streams, and short waits."""
    largest = max(map(len, [*world.plain, *world.prefixed]))
    return {
        "admin_key": admin_key,
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": _MAX_LEN,
        "max_num_seqs": 64,
        "header_timeout_s": 5,  # so that half a request ends within a short run
        "body_timeout_s": 8,
        "max_adapter_bytes": max(2**20, largest),
    } | ({"num_threads": 1} if Path(world.model).name == f"{TINY}-llama" else {})


def _register(
    url: str, admin_key: str, names: Mapping[str, str], files: Mapping[str, bytes]
) -> None:
    for digest, name in names.items():
        headers = {"Authorization": f"Bearer {admin_key}"}
        path = f"{url}/admin/adapters/{name}"
        httpx.post(path, content=files[digest], headers=headers).raise_for_status()


def _crowd(options: Options, url: str, questions: list[Question]) -> dict[str, Any]:
    """What came of the crowd, which is a process of its own."""
    host, port = url.removeprefix("http://").split(":")
    plan = {
        "host": host,
        "port": int(port),
        "seconds": options.seconds,
        "num_connections": options.connections,
        "num_streams": options.streams,
        "questions": [asdict(question) for question in questions],
        "seed": options.seed,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load.crowd"],
        input=json.dumps(plan),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the crowd failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    ends = found["ends"]
    uncounted = found["requests"] - sum(ends.values())
    share = found["client_cpu_s"] / found["seconds"] / (os.cpu_count() or 1)
    return {
        "requests": found["requests"],
        "lost": ends.get("lost", 0) + uncounted,
        "wrong_adapter": ends.get("wrong_adapter", 0),
        **{end: ends.get(end, 0) for end in ("answered", "refused", "left")},
        "questions": len(questions),
        **{name: found[name] for name in ("connections", "streams", "members", "seconds")},
        "client_share_of_cores": round(share, 4),
        "problems": found["problems"],
    }


async def _leaks(url: str) -> list[str]:
    """What a server at rest has left that it must not have."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        return find_leaks(await wait_for_rest(http))


def _overhead(
    options: Options,
    world: World,
    process: ServerProcess,
    url: str,
    names: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The server against its engine alone, under the adapters that edit prompts."""
    chosen = {d: a for d, a in world.adapters.items() if a.spec.method != _DECODES_TOO}
    given = {name: value for name, value in settings.items() if name != "admin_key"}
    engine = EmbeddedEngine(world.loaded, Settings(**given).engine_config())
    for adapter in chosen.values():
        engine.load_adapter(adapter)
    engine.start()
    try:
        target = Target(url, process.pid, tuple(names[digest] for digest in chosen))
        return measure_overhead(engine, target, list(chosen), options.repeats)
    finally:
        engine.stop()
