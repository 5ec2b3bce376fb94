"""What an answer had to be: the same request alone in an engine of its own."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.loading import LoadedModel

TIE = 1e-4
"""Two logits this close may come in either order: batches round differently."""


@dataclass(frozen=True)
class Case:
    """What decides a greedy answer."""

    adapters: tuple[tuple[str, float | None], ...]
    """Digest and strength of each."""
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Observed:
    """A greedy answer that the server gave, or the beginning of one."""

    case: Case
    text: str
    max_tokens: int
    stop: str | None
    finish_reason: str | None
    """None if the answer was cut off, by whomever."""


@dataclass(frozen=True)
class Solo:
    """The answer as it had to be."""

    token_ids: list[int]
    gaps: list[float]
    """Between the likeliest token's log-probability and the next one's."""
    ended: bool


class Oracle:
    """Checks observed answers in a thread of its own, one solo run a case.

    The engine has one slot, no prefix cache, and runs transformers' own forward.
    """

    def __init__(
        self, loaded: LoadedModel, adapters: Mapping[str, Adapter], max_tokens: int, max_len: int
    ) -> None:
        self._tokenizer = loaded.tokenizer
        self._max_tokens = max_tokens
        config = EngineConfig(
            max_model_len=max_len, max_num_seqs=1, prefix_cache_bytes=0, forward="transformers"
        )
        self._engine = EmbeddedEngine(loaded, config)
        for adapter in adapters.values():
            self._engine.load_adapter(adapter)
        self._ids = itertools.count()
        self._known: dict[Case, Solo] = {}
        self._todo: queue.SimpleQueue[Observed | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="oracle")
        self.wrong: list[str] = []
        self.num_checked = 0
        self.num_ties = 0

    @property
    def num_cases(self) -> int:
        """Solo runs made."""
        return len(self._known)

    @property
    def num_distinct(self) -> int:
        """Different answers among them; near the number of cases, a mix-up would be seen."""
        return len({tuple(solo.token_ids) for solo in self._known.values()})

    def start(self) -> None:
        """Start both threads."""
        self._engine.start()
        self._thread.start()

    def check(self, observed: Observed) -> None:
        """Have an answer checked, some time before :meth:`finish` returns."""
        self._todo.put(observed)

    def finish(self) -> None:
        """Check what is left, and end."""
        self._todo.put(None)
        self._thread.join()
        self._engine.stop()

    def solo(self, case: Case) -> Solo:
        """The case's answer, as long as any request may ask for."""
        if case not in self._known:
            params = SamplingParams(max_tokens=self._max_tokens, temperature=0, logprobs=2)
            choices = tuple(AdapterChoice(*adapter) for adapter in case.adapters)
            request = Request(str(next(self._ids)), case.prompt, params, choices)
            (completion,) = generate(self._engine, [request])
            gaps = [
                t.top_logprobs[0].logprob - t.top_logprobs[1].logprob for t in completion.tokens
            ]
            ended = completion.finish_reason == "stop"
            ids = completion.token_ids
            self._known[case] = Solo(ids[:-1] if ended else ids, gaps, ended)
        return self._known[case]

    def _run(self) -> None:
        while (observed := self._todo.get()) is not None:
            try:
                self._judge(observed)
            except Exception as error:
                self.wrong.append(f"no solo answer for {observed.case}: {error!r}")

    def _judge(self, observed: Observed) -> None:
        """Compare one answer with the solo run's."""
        solo = self.solo(observed.case)
        self.num_checked += 1
        text, reason = self._expected(solo, observed)
        if observed.finish_reason is None:
            right = text.startswith(observed.text)
        else:
            right = (observed.text, observed.finish_reason) == (text, reason)
        if right:
            return
        if min(solo.gaps[: self._num_shared(solo, observed.text) + 1]) < TIE:
            self.num_ties += 1
            return
        self.wrong.append(f"{observed}, expected {text!r}, {reason}")

    def _expected(self, solo: Solo, observed: Observed) -> tuple[str, str]:
        """Text and finish reason."""
        text, reason = self.answer(solo, observed.max_tokens)
        if observed.stop is not None and observed.stop in text:
            return text[: text.index(observed.stop)], "stop"
        return text, reason

    def answer(self, solo: Solo, max_tokens: int) -> tuple[str, str]:
        """Text and finish reason of so many tokens without a stop string."""
        ends = solo.ended and len(solo.token_ids) < max_tokens
        return self._decode(solo.token_ids[:max_tokens]), "stop" if ends else "length"

    def _num_shared(self, solo: Solo, text: str) -> int:
        """First tokens of the solo answer whose text the observed one begins with."""
        count = 0
        for length in range(1, len(solo.token_ids) + 1):
            if text.startswith(self._decode(solo.token_ids[:length])):
                count = length
        return count

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
