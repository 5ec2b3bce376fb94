"""Asks an engine in this process: every row, contender and candidate in one continuous batch."""

from __future__ import annotations

import math
import queue
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

from transformers import PreTrainedTokenizerBase

from reft_core.classification import answer_tokens, counted
from reft_core.engine.interface import (
    AdapterChoice,
    Engine,
    Output,
    Request,
    SamplingParams,
    Token,
)
from reft_core.errors import EngineOverloaded, EngineUnavailable, InvalidRequest
from reft_core.templates import encode_chat, encode_text
from trainer.evaluation.asking.interface import Contender, Question, Reply
from trainer.evaluation.rows import Row

MAX_OPEN = 256
"""Requests that are at the engine at once, running or waiting."""
_SCORE = SamplingParams(temperature=0, logprobs=0)
_TEXT, _LOSS = "text", "loss"


class Encoding:
    """Questions in token ids, by the functions that serving uses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens_of = lru_cache(4096)(partial(answer_tokens, tokenizer))
        self._num_counted = lru_cache(256)(self._count)

    def longest(self, questions: Sequence[Question]) -> int:
        """Tokens of the longest prompt with its answer and the virtual tokens before it."""
        most = 0
        for question in questions:
            virtual = _num_virtual(question)
            parts = self.parts(question)
            answers = [
                len(tokens) if name != _TEXT else question.wanted.max_tokens
                for name, tokens in parts.items()
            ]
            most = max(most, virtual + len(self.prompt(question)) + max(answers, default=1))
        return most

    def parts(self, question: Question) -> dict[str, tuple[int, ...]]:
        """What is asked of one prompt: by name, the tokens whose likelihood counts; () is a
        greedy answer.

        A reference that is one of the candidates is not asked twice.
        """
        row, wanted = question.row, question.wanted
        parts: dict[str, tuple[int, ...]] = {}
        if wanted.text:
            parts[_TEXT] = ()
        if wanted.choice:
            parts |= {str(n): self._tokens_of(text) for n, text in enumerate(row.candidates)}
        if wanted.loss and not row.turns:
            parts[_LOSS] = self._read(row)[1:]
        elif wanted.loss and not (wanted.choice and row.references[0] in row.candidates):
            parts[_LOSS] = self._tokens_of(row.references[0])
        return parts

    def _read(self, row: Row) -> tuple[int, ...]:
        """The tokens of a text that is only read: the first is its prompt, and no end follows."""
        tokens = tuple(encode_text(self._tokenizer, row.references[0]))
        if len(tokens) < 2:
            got = f"{len(tokens)} tokens"
            raise InvalidRequest.because(f"{row.where}: text", got, "at least 2, to predict one")
        return tokens

    def num_counted(self, question: Question) -> tuple[int, ...]:
        """How many tokens of each candidate that is asked about its likelihood is of."""
        return self._num_counted(question.row.candidates) if question.wanted.choice else ()

    def _count(self, candidates: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(map(len, counted([self._tokens_of(text) for text in candidates])))

    def prompt(self, question: Question) -> tuple[int, ...]:
        """The conversation as its contender is given it."""
        row = question.row
        if not row.turns:
            return self._read(row)[:1]
        try:
            return tuple(encode_chat(self._tokenizer, row.messages, question.contender.template))
        except InvalidRequest as error:
            raise error.within(row.where) from None


class EngineAsker:
    """Implements :class:`interface.Asker` on an engine that has been started.

    A row's candidates, and contenders that read it alike, share what its prompts have in common:
    requests of one row are neighbours in the queue. Adapters are loaded as they are needed.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, *, max_open: int = MAX_OPEN
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_open = max_open
        self._encoding = Encoding(tokenizer)

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """See :meth:`interface.Asker.ask`."""
        run = _Run(deque(), queue.SimpleQueue())
        todo = self._requests(uuid.uuid4().hex, questions)
        try:
            while self._fill(run, todo) or run.requests:
                output = run.outputs.get()
                asked = run.asked[_place_of(output.request_id)]
                asked.take(output)
                if output.finish_reason is None:
                    continue
                run.requests.discard(output.request_id)
                if not asked.running:
                    del run.asked[asked.place]
                    yield asked.place, asked.reply(self._tokenizer)
        finally:
            for request_id in run.requests:
                self._engine.cancel(request_id)

    def _fill(self, run: _Run, todo: Iterator[tuple[_Asked, Request]]) -> bool:
        """Give the engine more requests once it has few; whether it was given any."""
        if len(run.requests) > self._max_open // 2:
            return False
        before = len(run.requests)
        with self._engine.together():
            while len(run.requests) < self._max_open:
                if not run.refused and (new := next(todo, None)) is not None:
                    run.refused.append(new)
                if not run.refused:
                    break
                asked, request = run.refused[0]
                try:
                    self._engine.submit(request, run.outputs.put)
                except EngineOverloaded:
                    if not run.requests:
                        raise
                    break
                except InvalidRequest as error:
                    raise error.within(asked.question.row.where) from None
                run.refused.popleft()
                run.asked[asked.place] = asked
                run.requests.add(request.request_id)
        return len(run.requests) > before

    def _requests(
        self, run: str, questions: Sequence[Question]
    ) -> Iterator[tuple[_Asked, Request]]:
        """The requests of all questions, made as they are needed."""
        for place, question in enumerate(questions):
            contender = question.contender
            parts = self._encoding.parts(question)
            asked = _Asked(place, question, parts, self._encoding.num_counted(question))
            chosen = self._chosen(contender)
            prompt = self._encoding.prompt(question)
            room = self._engine.max_model_len - _num_virtual(question) - len(prompt)
            text = SamplingParams(
                max_tokens=max(1, min(question.wanted.max_tokens, room)), temperature=0
            )
            for name, tokens in parts.items():
                request_id = f"{run}/{place}/{name}"
                params = text if name == _TEXT else _SCORE
                yield asked, Request(request_id, prompt, params, chosen, tokens)

    def _chosen(self, contender: Contender) -> tuple[AdapterChoice, ...]:
        adapter = contender.adapter
        if adapter is None:
            return ()
        if not self._engine.has_adapter(adapter.digest):
            self._engine.load_adapter(adapter)
        return (AdapterChoice(adapter.digest, contender.strength),)


@dataclass
class _Run:
    """What is at the engine."""

    refused: deque[tuple[_Asked, Request]]
    """The next request, where the engine's queue had no room for it."""
    outputs: queue.SimpleQueue[Output]
    asked: dict[int, _Asked] = field(default_factory=dict)
    """Questions by place."""
    requests: set[str] = field(default_factory=set)
    """Ids of those that have not ended."""


@dataclass
class _Asked:
    """One question while its requests run."""

    place: int
    question: Question
    parts: dict[str, tuple[int, ...]]
    num_counted: tuple[int, ...]
    """Of each candidate the tokens that its likelihood is of."""
    tokens: dict[str, list[Token]] = field(default_factory=dict)
    finish_reason: str = ""

    def __post_init__(self) -> None:
        self.running = set(self.parts)

    def take(self, output: Output) -> None:
        """Note a token, or the end, of one of the requests. Raises its error."""
        name = output.request_id.rpartition("/")[2]
        if output.error is not None:
            raise output.error.within(self.question.row.where)
        if output.finish_reason == "cancelled":
            raise EngineUnavailable("the engine cancelled the request")
        if output.token is not None:
            self.tokens.setdefault(name, []).append(output.token)
        if output.finish_reason is not None:
            self.running.discard(name)
            if name == _TEXT:
                self.finish_reason = output.finish_reason

    def reply(self, tokenizer: PreTrainedTokenizerBase) -> Reply:
        """What the requests found, once all have ended."""
        row, wanted = self.question.row, self.question.wanted
        ids = [token.token_id for token in self.tokens.get(_TEXT, ())]
        logprobs = tuple(self._logprob(str(n), each) for n, each in enumerate(self.num_counted))
        loss, num_tokens = 0.0, 0
        if wanted.loss:
            name = _LOSS if _LOSS in self.parts else _place_in(row)
            loss, num_tokens = -self._logprob(name), len(self.parts[name])
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return Reply(text, self.finish_reason, logprobs, loss, num_tokens)

    def _logprob(self, name: str, count: int | None = None) -> float:
        """Of the first ``count`` tokens of a part; of all for None."""
        return math.fsum(token.logprob or 0.0 for token in self.tokens[name][:count])


def _place_in(row: Row) -> str:
    """The name of the candidate that is the row's reference."""
    return str(row.candidates.index(row.references[0]))


def _place_of(request_id: str) -> int:
    return int(request_id.split("/")[1])


def _num_virtual(question: Question) -> int:
    """Positions that the contender's virtual tokens take before a prompt."""
    adapter = question.contender.adapter
    return 0 if adapter is None else adapter.num_virtual_tokens
