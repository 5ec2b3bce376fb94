"""What HTTP costs: the same requests over sockets and straight into an engine, in turns.

Regime: 64 greedy requests at once, each of 64 random prompt tokens and 64 answer tokens, under
adapters in turn; as many slots as requests. The engine alone runs in this process, the server in
its own, and each rests while the other works. The client only empties its sockets, twenty times a
second, so that what it takes of the cores is hardly anything; it is reported all the same.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.load.wire import Reader, post_bytes
from benchmarks.work import greedy_requests, random_prompts
from reft_core.engine.interface import Engine, Output

NUM_STREAMS = 64
PROMPT_TOKENS = 64
ANSWER_TOKENS = 64
_NAP_S = 0.05


@dataclass(frozen=True)
class Turn:
    """One way through all requests."""

    tokens_per_s: float
    cpu_s: float
    """Of the process that computes, all threads."""
    loop_cpu_us: float = 0.0
    """Of the server's event loop, microseconds a token."""
    client_cpu_s: float = 0.0


@dataclass(frozen=True)
class Target:
    """The server under test."""

    url: str
    pid: int
    names: tuple[str, ...]
    """Adapters, in the order of ``digests``."""


def measure_overhead(
    engine: Engine,
    target: Target,
    digests: Sequence[str],
    repeats: int,
    answer_tokens: int = ANSWER_TOKENS,
) -> dict[str, Any]:
    """Throughput over HTTP as a share of the engine's own, over so many pairs of turns.

    The engine must be started, and both must hold the adapters.
    """
    pairs: list[tuple[Turn, Turn]] = []
    for seed in range(-1, repeats):  # the first pair warms both up
        prompts = random_prompts(engine.model, NUM_STREAMS, PROMPT_TOKENS, seed=seed + 1)
        http_first = seed % 2 == 0
        over_http = _over_http(target, prompts, answer_tokens) if http_first else None
        alone = _alone(engine, prompts, digests, answer_tokens)
        over_http = over_http or _over_http(target, prompts, answer_tokens)
        if seed >= 0:
            pairs.append((over_http, alone))
    ratios = [http.tokens_per_s / alone.tokens_per_s for http, alone in pairs]
    cpu_ratios = [http.cpu_s / alone.cpu_s for http, alone in pairs]
    return {
        "http_over_engine": round(statistics.median(ratios), 4),
        "http_over_engine_spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "server_cpu_over_engine_cpu": round(statistics.median(cpu_ratios), 4),
        "server_cpu_over_engine_cpu_spread": [
            round(min(cpu_ratios), 4),
            round(max(cpu_ratios), 4),
        ],
        "http": [asdict(http) for http, _ in pairs],
        "engine": [asdict(alone) for _, alone in pairs],
    }


def _alone(
    engine: Engine, prompts: Sequence[Sequence[int]], digests: Sequence[str], answer_tokens: int
) -> Turn:
    """All requests straight into the engine."""
    requests = greedy_requests(prompts, answer_tokens, digests)
    done = threading.Event()
    num_open = len(requests)

    def sink(output: Output) -> None:
        nonlocal num_open
        if output.finish_reason is not None:
            assert output.finish_reason == "length", output
            num_open -= 1
            if not num_open:
                done.set()

    cpu, began_at = time.process_time(), time.perf_counter()
    with engine.together():
        for request in requests:
            engine.submit(request, sink)
    done.wait()
    seconds = time.perf_counter() - began_at
    return Turn(len(prompts) * answer_tokens / seconds, time.process_time() - cpu)


def _over_http(target: Target, prompts: Sequence[Sequence[int]], answer_tokens: int) -> Turn:
    """All requests as streams, each on a connection of its own."""
    host, port = target.url.removeprefix("http://").split(":")
    asks = [
        post_bytes(
            "/v1/completions",
            {
                "model": target.names[i % len(target.names)],
                "prompt": prompt,
                "max_tokens": answer_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            },
        )
        for i, prompt in enumerate(prompts)
    ]
    connections = [socket.create_connection((host, int(port))) for _ in asks]
    for connection in connections:
        connection.setblocking(False)
    unread = {connection: Reader() for connection in connections}
    readers = list(unread.values())
    cpu, loop_cpu = _cpu_s(target.pid), _loop_cpu_s(target.pid)
    own_cpu, began_at = time.process_time(), time.perf_counter()
    for connection, ask in zip(connections, asks, strict=True):
        connection.sendall(ask)
    while unread:
        time.sleep(_NAP_S)
        for connection, reader in list(unread.items()):
            try:
                data = connection.recv(1 << 20)
            except BlockingIOError:
                continue
            if reader.feed(data):
                del unread[connection]
            elif not data:
                raise RuntimeError(f"a stream was cut off: {bytes(reader.data[-300:])!r}")
    seconds = time.perf_counter() - began_at
    own_cpu = time.process_time() - own_cpu
    cpu, loop_cpu = _cpu_s(target.pid) - cpu, _loop_cpu_s(target.pid) - loop_cpu
    for connection in connections:
        connection.close()
    for reader in readers:
        _check_whole(reader)
    num_tokens = len(prompts) * answer_tokens
    return Turn(num_tokens / seconds, cpu, loop_cpu / num_tokens * 1e6, own_cpu)


def _check_whole(reader: Reader) -> None:
    """Raise unless an answer has its end, and the length that was asked for."""
    response = reader.response()
    events = response.events() if response.status == 200 else []
    if events[-1:] != ["[DONE]"]:
        raise RuntimeError(f"a stream failed: {response}")
    last = json.loads(events[-2])["choices"][0]["finish_reason"]
    if last != "length":
        raise RuntimeError(f"a stream ended by {last!r}, not by its length")


def _cpu_s(pid: int) -> float:
    """Processor seconds that a process has taken, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _loop_cpu_s(pid: int) -> float:
    """The same of its first thread, where the event loop runs."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9
