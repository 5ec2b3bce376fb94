"""What a server at rest must not have left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import httpx

from benchmarks.soak.server import Footprint, ServerProcess, read_metrics

_REST_TIMEOUT_S = 60
_MORE_THREADS = 6
"""Threads that may come later than the baseline: the event loop's pool grows on demand."""
_MORE_FILES = 12
"""Files likewise: the catalog's pool of connections, each with its log."""


async def wait_for_rest(http: httpx.AsyncClient) -> dict[str, float]:
    """The metrics once nothing runs or waits any more, or after a minute whatever they are."""
    give_up_at = time.monotonic() + _REST_TIMEOUT_S
    while True:
        metrics = await read_metrics(http)
        if not find_leaks(metrics) or time.monotonic() > give_up_at:
            return metrics
        await asyncio.sleep(0.1)


def find_leaks(metrics: dict[str, float]) -> list[str]:
    """What the metrics of a server at rest say that they must not."""
    held, free, most = (
        metrics[f"reft_prefix_cache_blocks{suffix}"] for suffix in ("", "_free", "_max")
    )
    resident, budget = (metrics[f"reft_adapter_{name}_bytes"] for name in ("resident", "budget"))
    pinned = metrics["reft_adapters_pinned"]
    wrong = {
        "slots in use": metrics["reft_num_requests_running"],
        "requests waiting": metrics["reft_num_requests_waiting"],
        "share of the key-value store in use": metrics["reft_kv_cache_usage_perc"],
        "uses of adapters": metrics["reft_adapter_references"] - pinned,
        "adapters waiting for room": metrics["reft_adapters_waiting"],
        "prefix cache blocks neither held nor free": most - held - free,
        "bytes of adapters beyond the budget": max(0.0, resident - budget),
    }
    return [f"{value:g} {what}" for what, value in wrong.items() if value]


async def audit(
    http: httpx.AsyncClient,
    process: ServerProcess,
    names: Sequence[str],
    admin: dict[str, str],
) -> list[str]:
    """Everything a server at rest has left that it must not have."""
    leaks = find_leaks(await wait_for_rest(http))
    digests: set[str] = set()
    for name in names:
        answer = await http.get(f"/admin/adapters/{name}", headers=admin)
        if answer.status_code == 404:
            continue
        for card in answer.json()["versions"]:
            digests.add(card["digest"])
            if card["num_users"]:
                leaks.append(f"{card['num_users']} users of {name}@{card['version']}")
    stored = _stored(process)
    for _ in range(50):  # deleted files go in the server's own time
        if stored <= digests:
            break
        await asyncio.sleep(0.1)
        stored = _stored(process)
    if stored != digests:
        leaks.append(
            f"{len(stored - digests)} files that no name has, {len(digests - stored)} missing"
        )
    left = [*process.data.rglob(".tmp-*"), *process.temporary.iterdir()]
    leaks += [f"temporary file {path.name}" for path in left]
    return leaks


def _stored(process: ServerProcess) -> set[str]:
    """Digests of the files in the server's store."""
    return {path.stem for path in process.data.glob("blobs/??/*.safetensors")}


def compare(before: Footprint | None, after: Footprint | None, max_growth_mb: float) -> list[str]:
    """What a process has taken between two rests beyond what it may."""
    if before is None or after is None:
        return []
    grown = {
        "threads": (after.num_threads - before.num_threads, _MORE_THREADS),
        "open files": (after.num_files - before.num_files, _MORE_FILES),
        "MiB of memory": (after.rss_mb - before.rss_mb, max_growth_mb),
    }
    return [
        f"{more:g} more {what} after the second half, at most {most:g} expected"
        for what, (more, most) in grown.items()
        if more > most
    ]
