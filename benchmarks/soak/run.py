"""One soak from start to summary."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.soak.audit import audit, compare, wait_for_rest
from benchmarks.soak.client import Client
from benchmarks.soak.oracle import Case, Oracle
from benchmarks.soak.server import ServerProcess
from benchmarks.soak.traffic import MAX_TOKENS, Name, Traffic
from benchmarks.soak.world import TINY, World, make_world

_MAX_LEN = 144
_SLOTS = 6


@dataclass(frozen=True)
class Options:
    """How long and how hard."""

    model: str = TINY
    seconds: float = 600.0
    seed: int = 0
    num_files: int = 24
    max_rss_growth_mb: float | None = None
    """Memory that the second half may add. None: little, or in a run of a few minutes, whose
    first half does not fill all caches, more."""

    @property
    def rss_limit_mb(self) -> float:
        """:attr:`max_rss_growth_mb`, decided."""
        if self.max_rss_growth_mb is not None:
            return self.max_rss_growth_mb
        return 24.0 if self.seconds >= 500 else 128.0


def run(options: Options) -> dict[str, Any]:
    """The soak's summary; it passed if ``lost``, ``wrong`` and ``leaks`` are empty."""
    with tempfile.TemporaryDirectory(prefix="reft-soak-") as made:
        folder = Path(made)
        world = make_world(options.model, folder, options.num_files, options.seed)
        oracle = Oracle(world.loaded, world.adapters, MAX_TOKENS, _MAX_LEN)
        oracle.start()
        try:
            rate = _calibrate(oracle)
            return _run(options, world, oracle, folder, rate)
        finally:
            oracle.finish()


def _calibrate(oracle: Oracle) -> float:
    """Requests a second that keep a server on this machine busy."""
    oracle.solo(Case((), (1,)))
    began_at = time.monotonic()
    oracle.solo(Case((), (2, 3)))
    return min(40.0, 1.5 / (time.monotonic() - began_at))


def _run(
    options: Options, world: World, oracle: Oracle, folder: Path, rate: float
) -> dict[str, Any]:
    files = dict(zip(world.adapters, _files(world), strict=True))
    admin_key = secrets.token_urlsafe(24)
    process = ServerProcess(world.model, folder, _settings(world, files, admin_key, rate))
    try:
        url = process.wait_ready()
        summary = asyncio.run(_drive(options, world, oracle, process, files, url, admin_key, rate))
        status = process.stop()
        summary["leaks"] += [f"exit status {status}"] if status else []
        summary["leaks"] += [f"logged error: {error}" for error in process.errors()]
    finally:
        process.kill()
    oracle.finish()
    summary["wrong"] += len(oracle.wrong)
    summary["problems"] += oracle.wrong
    summary |= {
        "checked": oracle.num_checked,
        "ties": oracle.num_ties,
        "cases": oracle.num_cases,
        "distinct": oracle.num_distinct,
    }
    return summary


def _files(world: World) -> list[bytes]:
    return [*world.plain, *world.prefixed]


def _settings(
    world: World, files: dict[str, bytes], admin_key: str, rate: float
) -> dict[str, object]:
    """A server that is short of everything."""
    largest = max(map(len, files.values()))
    return {
        "admin_key": admin_key,
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "max_model_len": _MAX_LEN,
        "max_num_seqs": _SLOTS,
        "max_waiting": 20,
        "max_prefill_tokens": 48,
        "kv_tokens": _MAX_LEN,
        "prefix_cache_bytes": 40 * 16 * _token_bytes(world),
        "max_adapter_bytes": max(512 * 1024, largest),
        "adapter_memory_bytes": max(2**20, 4 * largest),
        "adapter_wait_s": 20 / rate,
        "request_timeout_s": 30 / rate,
        "max_n": 4,
        "pinned_adapters": "stable-0",
        "delete_grace_s": 0,
        "registry_poll_s": 0.2,
    }


def _token_bytes(world: World) -> int:
    """Bytes of a token's keys and values."""
    base = world.loaded.description
    return 2 * 4 * base.num_layers * base.num_kv_heads * base.head_dim


def _names(world: World, digests: list[str]) -> list[Name]:
    """Names whose files change, some of which come and go, and some share files."""
    plain, prefixed = digests[: len(world.plain)], digests[len(world.plain) :]
    names = [Name(f"stable-{i}", plain[i::6] + plain[:1]) for i in range(6)]
    names += [Name(f"fickle-{i}", plain[i::4], may_vanish=True) for i in range(4)]
    return [*names, Name("prefix", prefixed, may_stack=False)]


async def _drive(
    options: Options,
    world: World,
    oracle: Oracle,
    process: ServerProcess,
    files: dict[str, bytes],
    url: str,
    admin_key: str,
    rate: float,
) -> dict[str, Any]:
    """Both halves of the traffic, each followed by a rest and an audit."""
    names = _names(world, list(files))
    admin = {"Authorization": f"Bearer {admin_key}"}
    base = world.loaded.description.name
    # Shorter than the server keeps a connection, or one might be used as it closes.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=2.0)
    leaks: list[str] = []
    footprints = []
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        client = Client(http, oracle, {name.name: name.history for name in names})
        traffic = Traffic(
            client=client,
            tokenizer=world.loaded.tokenizer,
            base=base,
            names=names,
            files=files,
            foreign=world.foreign,
            admin=admin,
            rate=rate,
            seed=options.seed,
        )
        await traffic.register_all()
        for half in ("first", "second"):
            await traffic.run(options.seconds / 2)
            found = await audit(http, process, [name.name for name in names], admin)
            leaks += [f"after the {half} half: {leak}" for leak in found]
            footprints.append(process.footprint())
        metrics = await wait_for_rest(http)
    before, after = footprints
    leaks += compare(before, after, options.rss_limit_mb)
    return {
        "requests": client.num_requests,
        **{end: client.ends[end] for end in ("answered", "refused", "expired", "cancelled")},
        "lost": client.ends["lost"] + client.num_requests - client.ends.total(),
        "wrong": client.ends["wrong"],
        "refusals": {str(status): n for status, n in sorted(client.refusals.items()) if n},
        "preemptions": int(metrics["reft_num_preemptions_total"]),
        "cached_tokens": int(metrics["reft_prefix_cache_hits_total"]),
        "cold_loads": int(metrics["reft_adapter_cold_loads_total"]),
        "evictions": int(metrics["reft_adapter_evictions_total"]),
        "leaks": leaks,
        "rss_growth_mb": round(after.rss_mb - before.rss_mb, 1) if before and after else None,
        "problems": client.problems,
    }
