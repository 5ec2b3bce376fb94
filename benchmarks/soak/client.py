"""Sends one request and says how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from benchmarks.soak.names import NameHistory
from benchmarks.soak.oracle import Case, Observed, Oracle

End = Literal["answered", "refused", "expired", "cancelled", "lost", "wrong"]
"""refused: with a 4xx that fits, a 429 or a 503. expired: with a 504, or its event in a stream.
lost: nothing, not the end, or a failure of the server's. wrong: an answer that cannot be."""


@dataclass(frozen=True)
class Ask:
    """A request for text."""

    path: str
    body: dict[str, Any]
    prompts: tuple[tuple[int, ...], ...]
    """In tokens, as the server must understand them."""
    names: tuple[tuple[str, float | None], ...]
    """Adapters by name, with their strengths."""
    leave_after_s: float | None = None
    """When we hang up."""
    leave_after_events: int | None = None
    """After how many events of a stream we hang up."""

    @property
    def num_choices(self) -> int:
        """Answers it asks for."""
        return len(self.prompts) * int(self.body.get("n", 1))

    @property
    def is_greedy(self) -> bool:
        """Whether the oracle knows the answers."""
        return bool(self.body.get("temperature") == 0)


@dataclass
class _Answer:
    """What came of a request for text."""

    digests: list[str] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str | None] = field(default_factory=dict)
    is_whole: bool = False
    error: dict[str, Any] | None = None


class Client:
    """Sends requests and keeps the tally."""

    def __init__(
        self, http: httpx.AsyncClient, oracle: Oracle, histories: Mapping[str, NameHistory]
    ) -> None:
        self._http = http
        self._oracle = oracle
        self._histories = histories
        self.ends: Counter[End] = Counter()
        self.refusals: Counter[int] = Counter()
        """How many of each status."""
        self.num_requests = 0
        self.problems: list[str] = []

    async def ask(self, ask: Ask) -> None:
        """Send a request for text, and check whatever comes."""
        self.num_requests += 1
        sent_at = time.monotonic()
        answer = _Answer()
        try:
            async with asyncio.timeout(ask.leave_after_s):
                if ask.body.get("stream"):
                    status = await self._stream(ask, answer)
                else:
                    status = await self._whole(ask, answer)
        except TimeoutError:
            status = None
        except httpx.HTTPError as error:
            self._end("lost", f"{error!r} for {ask}")
            return
        self._judge(ask, status, answer, sent_at)

    async def send(
        self,
        method: str,
        path: str,
        allowed: Mapping[int, End],
        *,
        leave_after_s: float | None = None,
        **options: Any,
    ) -> int | None:
        """Send any other request; its status, which must be ``allowed``, or None."""
        self.num_requests += 1
        try:
            async with asyncio.timeout(leave_after_s):
                answer = await self._http.request(method, path, **options)
        except TimeoutError:
            self._end("cancelled")
            return None
        except httpx.HTTPError as error:
            self._end("lost", f"{error!r} for {method} {path}")
            return None
        end = allowed.get(answer.status_code)
        if end is None:
            kind: End = "lost" if answer.status_code >= 500 else "wrong"
            self._end(kind, f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        else:
            self._end(end)
            self.refusals[answer.status_code] += end == "refused"
        return answer.status_code

    async def _whole(self, ask: Ask, answer: _Answer) -> int:
        """An answer in one piece."""
        response = await self._http.post(ask.path, json=ask.body)
        document = response.json()
        answer.digests = _digests(response)
        answer.error = document.get("error")
        for choice in document.get("choices", ()):
            index = choice["index"]
            answer.texts[index] = choice["text"] if "text" in choice else _content(choice)
            answer.reasons[index] = choice["finish_reason"]
        answer.is_whole = answer.error is None
        return response.status_code

    async def _stream(self, ask: Ask, answer: _Answer) -> int | None:
        """An answer in events; None if we hung up."""
        num_events = 0
        async with self._http.stream("POST", ask.path, json=ask.body) as response:
            answer.digests = _digests(response)
            if response.status_code != 200:
                answer.error = json.loads(await response.aread())["error"]
                return response.status_code
            async for line in response.aiter_lines():
                if not line:
                    continue
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    answer.is_whole = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    answer.error = event["error"]
                    continue
                for choice in event["choices"]:
                    index = choice["index"]
                    text = choice["text"] if "text" in choice else _content(choice)
                    answer.texts[index] = answer.texts.get(index, "") + text
                    if choice.get("finish_reason"):
                        answer.reasons[index] = choice["finish_reason"]
                num_events += 1
                if num_events == ask.leave_after_events:
                    return None
            return response.status_code

    def _judge(self, ask: Ask, status: int | None, answer: _Answer, sent_at: float) -> None:
        """Decide how a request ended, and have its text checked."""
        now = time.monotonic()
        possible = [self._histories[name].possible(sent_at, now) for name, _ in ask.names]
        is_gone = status == 404 and any(None in digests for digests in possible)
        if status in (None, 200):
            self._check_answer(ask, status, answer, possible)
        elif is_gone or status in (429, 503):
            self._end("refused")
            self.refusals[status] += 1
        elif status == 504:
            self._end("expired")
        else:
            kind: End = "lost" if status is not None and status >= 500 else "wrong"
            self._end(kind, f"{status} {answer.error} for {ask}")

    def _check_answer(
        self, ask: Ask, status: int | None, answer: _Answer, possible: list[set[str | None]]
    ) -> None:
        """Whether the adapters are those asked for, and all of the answer is there."""
        begun = bool(answer.digests)
        if begun and not _fits(answer.digests, possible):
            self._end("wrong", f"answered by {answer.digests}, not {possible}: {ask}")
            return
        if status is None:
            self._end("cancelled")
        elif answer.error is not None:
            expired = answer.error["code"] == "deadline_exceeded"
            self._end("expired" if expired else "lost", f"{answer.error} in {ask}")
        elif not answer.is_whole or len(answer.reasons) != ask.num_choices:
            self._end("lost", f"ended without an end: {answer} for {ask}")
            return
        else:
            self._end("answered")
        if not begun or not ask.is_greedy:
            return
        strengths = [strength for _, strength in ask.names]
        adapters = tuple(zip(answer.digests, strengths, strict=True))
        stops = ask.body.get("stop")
        for index, text in answer.texts.items():
            case = Case(adapters, ask.prompts[index // int(ask.body.get("n", 1))])
            reason = answer.reasons.get(index)
            self._oracle.check(Observed(case, text, ask.body["max_tokens"], stops, reason))

    def _end(self, end: End, why: str = "") -> None:
        """Count an end; those that must not be are kept with their reason."""
        self.ends[end] += 1
        if end in ("lost", "wrong"):
            self.problems.append(f"{end}: {why}")


def _digests(response: httpx.Response) -> list[str]:
    """The adapters that answered, in the order they act."""
    header = response.headers.get("x-reft-adapter", "")
    return [digest for digest in header.split(",") if digest not in ("", "base")]


def _fits(digests: list[str], possible: list[set[str | None]]) -> bool:
    """Whether each adapter is one that its name may have meant."""
    return len(digests) == len(possible) and all(
        digest in allowed for digest, allowed in zip(digests, possible, strict=True)
    )


def _content(choice: dict[str, Any]) -> str:
    """The text of a chat choice, whole or in part."""
    message = choice.get("message") or choice.get("delta") or {}
    return message.get("content") or ""
