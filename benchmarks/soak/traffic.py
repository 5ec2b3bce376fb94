"""Decides at random what is asked when."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.soak.client import Ask, Client, End
from benchmarks.soak.names import NameHistory
from reft_core.templates import encode_chat, encode_text

MAX_TOKENS = 40
_MOST_OPEN = 48
"""Requests of ours that may be open at once."""
_TEXTS = (
    "x",
    "Seven",
    "1 2 3 4 5 6 7 8",
    "The lighthouse keeper counts the ships",
    "The lighthouse keeper counts the gulls and writes each one down",
    "Once upon a time, when wishes still helped, there lived a king",
)


@dataclass
class Name:
    """A name that adapters are registered under, and the files it may mean."""

    name: str
    digests: Sequence[str]
    history: NameHistory = field(default_factory=NameHistory)
    may_vanish: bool = False
    may_stack: bool = True
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(eq=False)
class Traffic:
    """Random requests for text, uploads, deletes and mistakes, until told to stop."""

    client: Client
    tokenizer: PreTrainedTokenizerBase
    base: str
    """The base model's name."""
    names: Sequence[Name]
    files: Mapping[str, bytes]
    """By digest."""
    foreign: bytes
    """A file that does not fit."""
    admin: Mapping[str, str]
    """Headers that admin routes want."""
    rate: float
    """Requests a second when it is busy."""
    seed: int

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._open: set[asyncio.Task[None]] = set()

    async def register_all(self) -> None:
        """Give every name its first file."""
        for name in self.names:
            await self._upload(name, name.digests[0])

    async def run(self, seconds: float) -> None:
        """Traffic for that long; returns when everything asked has ended."""
        stop_at = time.monotonic() + seconds
        churn = asyncio.create_task(self._churn(stop_at))
        while time.monotonic() < stop_at:
            mood = self._random.choice(("quiet", "busy", "busy", "burst"))
            phase_ends_at = min(stop_at, time.monotonic() + self._random.uniform(0.5, 2))
            if mood == "burst":
                for _ in range(_MOST_OPEN):
                    self._start(self._any_request())
            rate = self.rate * {"quiet": 0.2, "busy": 1.0, "burst": 0.5}[mood]
            while (now := time.monotonic()) < phase_ends_at:
                self._start(self._any_request())
                await asyncio.sleep(min(self._random.expovariate(rate), phase_ends_at - now))
        await churn
        while self._open:
            await asyncio.wait(self._open)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` beside everything else, unless too much is open."""
        if len(self._open) >= _MOST_OPEN:
            work.close()
            return
        task = asyncio.create_task(work)
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        task.add_done_callback(lambda task: task.result())  # a bug of ours is shown

    async def _any_request(self) -> None:
        draw = self._random.random()
        if draw < 0.08:
            await self._mistake()
        elif draw < 0.11:
            await self.client.send("GET", "/v1/models", {200: "answered"})
        elif draw < 0.14:
            body = {
                "model": self._random.choice(self.names).name,
                "input": self._random.choices(_TEXTS, k=2),
                "labels": ["yes", "no", "perhaps"],
            }
            # A name may just be gone.
            ends: dict[int, End] = {200: "answered", 404: "refused", 429: "refused", 504: "expired"}
            await self.client.send("POST", "/v1/classify", ends, json=body)
        else:
            await self.client.ask(self._draw_ask())

    def _draw_ask(self) -> Ask:
        """A request for text."""
        rng = self._random
        names: list[tuple[str, float | None]] = []
        body: dict[str, Any] = {"model": self.base, "max_tokens": rng.randint(1, MAX_TOKENS)}
        if rng.random() < 0.9:
            name = rng.choice(self.names)
            strength = rng.choice((None, None, None, 0.5)) if name.may_stack else None
            body["model"] = name.name
            names.append((name.name, strength))
            options: dict[str, Any] = {} if strength is None else {"strength": strength}
            others = [n for n in self.names if n.may_stack and n is not name]
            if name.may_stack and rng.random() < 0.08:
                other = rng.choice(others)
                names.append((other.name, None))
                options["stack"] = [{"model": other.name}]
            if options:
                body["reft"] = options
        body["temperature"] = 0 if rng.random() < 0.93 else 0.8
        body["stream"] = rng.random() < 0.6
        body["priority"] = rng.choice((0, 0, 0, 0, -1, 5))
        if rng.random() < 0.15:
            body["stop"] = rng.choice("aeiou")
        if rng.random() < 0.1:
            body["n"] = 2
        path, prompts = self._draw_prompts(body)
        leave_after_s = rng.expovariate(5.0) if rng.random() < 0.1 else None
        leave_after_events = rng.randint(1, 6) if rng.random() < 0.12 else None
        return Ask(path, body, prompts, tuple(names), leave_after_s, leave_after_events)

    def _draw_prompts(self, body: dict[str, Any]) -> tuple[str, tuple[tuple[int, ...], ...]]:
        """Put prompts into ``body``; where it is to be sent, and their tokens."""
        draw, text = self._random.random(), self._random.choice(_TEXTS)
        if draw < 0.2:
            body["messages"] = [{"role": "user", "content": text}]
            tokens = encode_chat(self.tokenizer, body["messages"])
            return "/v1/chat/completions", (tuple(tokens),)
        texts = [text] if draw < 0.9 else self._random.sample(_TEXTS, 2)
        tokens_of = [encode_text(self.tokenizer, text) for text in texts]
        body["prompt"] = tokens_of if draw > 0.6 else texts
        return "/v1/completions", tuple(map(tuple, tokens_of))

    async def _mistake(self) -> None:
        """A request that must be refused, and how."""
        good = {"model": self.base, "prompt": "x", "max_tokens": 2}
        stable = next(name.name for name in self.names if not name.may_vanish)
        ask: dict[str, tuple[int, Any]] = {
            "unknown model": (404, {**good, "model": "nobody"}),
            "unknown version": (404, {**good, "model": f"{stable}@999"}),
            "unknown field": (400, {**good, "temprature": 1}),
            "wrong type": (400, {**good, "max_tokens": "many"}),
            "no prompt": (400, {"model": self.base}),
            "empty prompt": (400, {**good, "prompt": []}),
            "token out of range": (400, {**good, "prompt": [10**7]}),
            "too long": (400, {**good, "max_tokens": 10**5}),
            "too many choices": (400, {**good, "n": 1000}),
            "too hot": (400, {**good, "temperature": 99}),
            "strength of nothing": (400, {**good, "reft": {"strength": 2}}),
            "stacked base": (400, {**good, "reft": {"stack": [{"model": self.base}]}}),
            "strength out of range": (
                400,
                {**good, "model": stable, "reft": {"strength": 1e9}},
            ),
        }
        status, body = ask[self._random.choice(list(ask))]
        ends: dict[int, End] = {status: "refused", 429: "refused"}
        if self._random.random() < 0.2:
            await self.client.send(
                "POST",
                "/v1/completions",
                {400: "refused"},
                content=b'{"model": ',
                headers={"content-type": "application/json"},
            )
            return
        await self.client.send("POST", "/v1/completions", ends, json=body)

    async def _churn(self, stop_at: float) -> None:
        """Uploads, replacements and deletes, one after the other."""
        while time.monotonic() < stop_at:
            name = self._random.choice(self.names)
            draw = self._random.random()
            if draw < 0.25:
                await self._bad_upload(name.name)
            elif name.may_vanish and draw < 0.6 and name.history.current is not None:
                await self._delete(name)
            else:
                await self._upload(name, self._random.choice(name.digests))
            await asyncio.sleep(self._random.expovariate(self.rate / 4))

    async def _upload(self, name: Name, digest: str) -> None:
        ends: dict[int, End] = {200: "answered", 201: "answered"}
        await self._change(name, digest, "POST", ends, content=self.files[digest])

    async def _delete(self, name: Name) -> None:
        await self._change(name, None, "DELETE", {200: "answered"})

    async def _change(
        self,
        name: Name,
        digest: str | None,
        method: str,
        ends: Mapping[int, End],
        **options: Any,
    ) -> None:
        """Let ``name`` mean a file, or nothing; one change of a name at a time."""
        async with name.changing:
            change = name.history.begin(digest, time.monotonic())
            path = f"/admin/adapters/{name.name}"
            await self.client.send(method, path, ends, headers=self.admin, **options)
            change.ended_at = time.monotonic()

    async def _bad_upload(self, name: str) -> None:
        """A file that must not become what ``name`` means."""
        file = self.files[self._random.choice(list(self.files))]
        path = f"/admin/adapters/{name}"
        cases: list[tuple[str, int, bytes, Mapping[str, str]]] = [
            (path, 400, file[:-7], self.admin),
            (path, 400, b"not an adapter", self.admin),
            (path, 400, self.foreign, self.admin),
            (path, 413, bytes(600 * 1024), self.admin),
            (path, 401, file, {}),
            (f"/admin/adapters/{self.base}", 409, file, self.admin),
        ]
        if self._random.random() < 0.2:
            await self.client.send(
                "POST",
                path,
                {},
                content=_never_whole(file),
                headers=self.admin,
                leave_after_s=self._random.uniform(0.01, 0.2),
            )
            return
        where, status, content, headers = self._random.choice(cases)
        await self.client.send("POST", where, {status: "refused"}, content=content, headers=headers)


async def _never_whole(file: bytes) -> Any:
    """The first half of a file, and then nothing."""
    yield file[: len(file) // 2]
    await asyncio.sleep(60)
