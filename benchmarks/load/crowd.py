"""``python -m benchmarks.load.crowd``: the process that holds the connections.

Reads a plan as JSON from standard input, and writes what came of it to standard output. It imports
no more than it needs, and looks at an answer once it is whole, to leave the cores to the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load.wire import Reader, Response, get_bytes, post_bytes

_PATIENCE_S = 300.0
"""An answer that takes longer is lost."""
_SHARES = {"queued": 24, "sipping": 16, "stalled": 8, "leaving": 12, "half_open": 100, "wrong": 4}
"""Connections of each kind among a thousand; streams beside, the rest idle."""
_MISTAKES: tuple[tuple[int, dict[str, Any]], ...] = (
    (404, {"model": "nobody"}),
    (400, {"temperature": 99}),
    (400, {"max_tokens": 10**6}),
    (400, {"n": 1000}),
    (413, {"user": "x" * (3 * 1024 * 1024)}),
)
_MOST_PROBLEMS = 20


class Connection(asyncio.Protocol):
    """One connection, with at most one answer under way."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.closed = False
        self.reader = Reader()
        self._whole: asyncio.Future[Response | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep what has come; done when it is whole."""
        if self.reader.feed(data):
            self._done(self.reader.response())

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self.closed = True
        self._done(None)

    def ask(self, request: bytes) -> asyncio.Future[Response | None]:
        """Send a request, whole or not; its answer, or None if the connection ends without."""
        self.reader = Reader()
        self._whole = asyncio.get_running_loop().create_future()
        if self.closed:
            self._done(None)
        else:
            self.transport.write(request)
        return self._whole

    def _done(self, response: Response | None) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(response)


@dataclass
class Crowd:
    """All connections of one run, and the tally."""

    host: str
    port: int
    seconds: float
    num_connections: int
    num_streams: int
    questions: list[dict[str, Any]]
    seed: int
    ends: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_streams_open: int = 0
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._stop_at = 0.0
        self._open: set[Connection] = set()

    async def run(self) -> dict[str, Any]:
        """Hold all connections for that long, and see every request to its end."""
        self._stop_at = time.monotonic() + self.seconds
        scale = self.num_connections / 1000
        counts = {kind: max(1, round(share * scale)) for kind, share in _SHARES.items()}
        counts["stream"] = self.num_streams
        counts["idle"] = max(0, self.num_connections - sum(counts.values()))
        kinds: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "stream": self._stream,
            "queued": self._queued,
            "sipping": self._sipping,
            "stalled": self._stalled,
            "leaving": self._leaving,
            "half_open": self._half_open,
            "wrong": self._wrong,
            "idle": self._idle,
        }
        samples: list[tuple[int, int]] = []
        watching = asyncio.create_task(self._watch(samples))
        members = [self._repeat(kinds[kind]) for kind, n in counts.items() for _ in range(n)]
        began_at, cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*members)
        seconds = time.monotonic() - began_at
        watching.cancel()
        most_s = int(self.seconds)  # afterwards, they end one by one
        steady = samples[5:most_s] or samples
        return {
            "requests": self.num_requests,
            "ends": dict(self.ends),
            "connections": _least_and_median(s[0] for s in steady),
            "streams": _least_and_median(s[1] for s in steady),
            "members": counts,
            "client_cpu_s": round(time.process_time() - cpu, 2),
            "seconds": round(seconds, 2),
            "problems": self.problems,
        }

    # What members do, again and again -----------------------------------------------------

    async def _stream(self) -> None:
        """Streams, one after the other on one connection."""
        connection = await self._connect()
        for _ in range(self._random.randint(1, 8)):
            if connection.closed or time.monotonic() > self._stop_at:
                break
            self.num_streams_open += 1
            question = self._question()
            response = await self._answer(connection, self._ask(question, stream=True))
            self.num_streams_open -= 1
            self._judge(question, response)

    async def _queued(self) -> None:
        """A whole answer, for which the server has no slot at once."""
        connection, question = await self._connect(), self._question()
        response = await self._answer(connection, self._ask(question, stream=False))
        self._judge(question, response)
        await self._rest(1.0)

    async def _sipping(self) -> None:
        """A stream that is read a little at a time."""
        connection, question = await self._connect(), self._question()
        whole = asyncio.ensure_future(self._answer(connection, self._ask(question, stream=True)))
        while not whole.done():
            connection.transport.pause_reading()
            await asyncio.sleep(self._random.uniform(0.2, 1.0))
            connection.transport.resume_reading()
            await asyncio.wait({whole}, timeout=0.02)
            if connection.closed:
                break
        self._judge(question, await whole)
        await self._rest(2.0)

    async def _stalled(self) -> None:
        """A stream that is not read at all for a while, and then whole."""
        connection, question = await self._connect(), self._question()
        connection.transport.pause_reading()
        whole = asyncio.ensure_future(self._answer(connection, self._ask(question, stream=True)))
        await asyncio.sleep(self._random.uniform(2, 10))
        connection.transport.resume_reading()
        self._judge(question, await whole)

    async def _leaving(self) -> None:
        """A client that hangs up, perhaps before it has heard anything."""
        connection, question = await self._connect(), self._question()
        self.num_requests += 1
        whole = connection.ask(self._ask(question, stream=self._random.random() < 0.7))
        await asyncio.wait({whole}, timeout=self._random.expovariate(1.0))
        if whole.done():
            self._judge(question, whole.result())
        else:
            self.ends["left"] += 1
            connection.transport.abort()
        await self._rest(3.0)

    async def _half_open(self) -> None:
        """A request that never is whole: only part of its head, or of its body."""
        connection = await self._connect()
        whole = self._ask(self._question(), stream=False)
        head = whole.index(b"\r\n\r\n")
        cut = self._random.choice((0, 10, head - 3, head + 4, len(whole) - 1))
        self.num_requests += 1
        try:
            response = await asyncio.wait_for(connection.ask(whole[:cut]), _PATIENCE_S)
        except TimeoutError:
            self._lost(f"a request cut at {cut} was waited for without an end")
            return
        if response is None and cut == 0:
            self.ends["refused"] += 1
        else:
            self._expect(response, 408, "half a request")

    async def _wrong(self) -> None:
        """A request that must be refused, and how."""
        connection = await self._connect()
        status, change = self._random.choice(_MISTAKES)
        body = {"model": self.questions[0]["model"], "prompt": "x", "max_tokens": 2, **change}
        response = await self._answer(connection, post_bytes("/v1/completions", body))
        self._expect(response, status, f"a request with {list(change)}")
        await self._rest(2.0)

    async def _idle(self) -> None:
        """A connection that is hardly used."""
        connection = await self._connect()
        for _ in range(4):
            response = await self._answer(connection, get_bytes("/healthz"))
            self._expect(response, 200, "a health check")
            await self._rest(50.0)  # less than a server keeps a connection
            if time.monotonic() > self._stop_at:
                break

    # How they do it -----------------------------------------------------------------------

    async def _repeat(self, member: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Be one connection after another until time is up."""
        await self._rest(2.0)
        while time.monotonic() < self._stop_at:
            try:
                await member()
            except OSError as error:
                self.num_requests += 1
                self._lost(f"{member.__name__}: {error!r}")
                await asyncio.sleep(0.5)

    async def _connect(self) -> Connection:
        """A new connection; the task that makes it closes the one it had."""
        task = asyncio.current_task()
        assert task is not None
        for old in [c for c in self._open if getattr(c, "owner", None) is task]:
            old.transport.close()
            self._open.discard(old)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.host, self.port)
        connection.owner = task  # type: ignore[attr-defined]
        self._open.add(connection)
        return connection

    async def _answer(self, connection: Connection, request: bytes) -> Response | None:
        """The answer to a whole request; None if none came."""
        self.num_requests += 1
        try:
            return await asyncio.wait_for(connection.ask(request), _PATIENCE_S)
        except TimeoutError:
            connection.transport.abort()
            return None

    async def _rest(self, most: float) -> None:
        """Do nothing for a while, though not beyond the end."""
        left = max(0.0, self._stop_at - time.monotonic())
        await asyncio.sleep(min(left, self._random.uniform(0, most)))

    async def _watch(self, samples: list[tuple[int, int]]) -> None:
        """Note once a second how much is open."""
        while True:
            await asyncio.sleep(1)
            num_open = sum(not connection.closed for connection in self._open)
            samples.append((num_open, self.num_streams_open))

    def _question(self) -> dict[str, Any]:
        return self._random.choice(self.questions)

    def _ask(self, question: dict[str, Any], *, stream: bool) -> bytes:
        fields = {name: question[name] for name in ("model", "prompt", "max_tokens")}
        return post_bytes("/v1/completions", {**fields, "temperature": 0, "stream": stream})

    def _expect(self, response: Response | None, status: int, what: str) -> None:
        """Count a request that must be answered with ``status``."""
        if response is not None and response.status == status:
            refused = status >= 400
            if not refused or response.error_code:
                self.ends["refused" if refused else "answered"] += 1
                return
        self._lost(f"{what}: {response}, expected {status}")

    def _judge(self, question: dict[str, Any], response: Response | None) -> None:
        """Count a request for text by what came of it."""
        if response is None or response.status != 200:
            self._lost(f"{response} for {question}")
            return
        try:
            text, reason = _text_of(response)
        except (ValueError, KeyError, IndexError) as error:
            self._lost(f"{error!r} of {response}")
            return
        if reason is None:
            self._lost(f"ended without an end: {response}")
            return
        adapter = response.headers.get("x-reft-adapter")
        expected = (question["digest"] or "base", question["text"], question["finish_reason"])
        if (adapter, text, reason) == expected:
            self.ends["answered"] += 1
        else:
            self.ends["wrong_adapter"] += 1
            self._note(f"wrong: {(adapter, text, reason)}, expected {expected}")

    def _lost(self, why: str) -> None:
        self.ends["lost"] += 1
        self._note(f"lost: {why}")

    def _note(self, problem: str) -> None:
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem[:600])


def _text_of(response: Response) -> tuple[str, str | None]:
    """The text of an answer and why it ended; None if it has no end."""
    if response.headers.get("content-type", "").startswith("application/json"):
        choice = json.loads(response.body)["choices"][0]
        return choice["text"], choice["finish_reason"]
    events = response.events()
    if events[-1] != "[DONE]":
        return "", None
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return "".join(c["text"] for c in choices), choices[-1]["finish_reason"]


def _least_and_median(values: Iterable[int]) -> dict[str, int]:
    ordered = sorted(values) or [0]
    return {"least": ordered[0], "median": ordered[len(ordered) // 2]}


def main() -> None:
    """Run one plan."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    crowd = Crowd(**json.load(sys.stdin))
    print(json.dumps(asyncio.run(crowd.run())))


if __name__ == "__main__":
    main()
