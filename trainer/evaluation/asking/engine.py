"""Asks an engine in this process: every row, contender and candidate in one continuous batch."""

from __future__ import annotations

import math
import queue
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from reft_core.engine.interface import (
    AdapterChoice,
    Engine,
    Output,
    Request,
    SamplingParams,
    Token,
)
from reft_core.errors import EngineOverloaded, EngineUnavailable, InvalidRequest
from reft_core.templates import encode_chat
from trainer.evaluation.asking.interface import Contender, Question, Reply
from trainer.evaluation.rows import Row

MAX_OPEN = 256
"""Requests that are at the engine at once, running or waiting."""
_SCORE = SamplingParams(temperature=0, logprobs=0)
_TEXT, _LOSS = "text", "loss"


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
        self._tokens_of = lru_cache(4096)(self._completion)

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """See :meth:`interface.Asker.ask`."""
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        run = uuid.uuid4().hex
        todo = self._requests(run, questions)
        next_up = next(todo, None)
        open_questions: dict[int, _Asked] = {}
        open_requests: set[str] = set()
        try:
            while next_up is not None or open_requests:
                if next_up is not None and len(open_requests) <= self._max_open // 2:
                    with self._engine.together():
                        while next_up is not None and len(open_requests) < self._max_open:
                            asked, request = next_up
                            try:
                                self._engine.submit(request, outputs.put)
                            except EngineOverloaded:
                                if not open_requests:
                                    raise
                                break
                            open_questions[asked.place] = asked
                            open_requests.add(request.request_id)
                            next_up = next(todo, None)
                output = outputs.get()
                asked = open_questions[_place_of(output.request_id)]
                asked.take(output)
                if output.finish_reason is None:
                    continue
                open_requests.discard(output.request_id)
                if not asked.running:
                    del open_questions[asked.place]
                    yield asked.place, asked.reply(self._tokenizer)
        finally:
            for request_id in open_requests:
                self._engine.cancel(request_id)

    def longest(self, questions: Sequence[Question]) -> int:
        """Tokens of the longest prompt with its answer and the virtual tokens before it."""
        most = 0
        for question in questions:
            adapter = question.contender.adapter
            virtual = 0 if adapter is None else adapter.num_virtual_tokens
            parts = self._parts(question)
            answers = [
                len(tokens) if name != _TEXT else question.wanted.max_tokens
                for name, tokens in parts.items()
            ]
            most = max(most, virtual + len(self._prompt(question)) + max(answers, default=1))
        return most

    def _requests(
        self, run: str, questions: Sequence[Question]
    ) -> Iterator[tuple[_Asked, Request]]:
        """The requests of all questions, made as they are needed."""
        for place, question in enumerate(questions):
            contender = question.contender
            parts = self._parts(question)
            asked = _Asked(place, question, parts)
            chosen = self._chosen(contender)
            prompt = self._prompt(question)
            text = SamplingParams(max_tokens=question.wanted.max_tokens, temperature=0)
            for name, tokens in parts.items():
                request_id = f"{run}/{place}/{name}"
                params = text if name == _TEXT else _SCORE
                yield asked, Request(request_id, prompt, params, chosen, tokens)

    def _parts(self, question: Question) -> dict[str, tuple[int, ...]]:
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
        if wanted.loss and not (wanted.choice and row.references[0] in row.candidates):
            parts[_LOSS] = self._tokens_of(row.references[0])
        return parts

    def _completion(self, text: str) -> tuple[int, ...]:
        """An answer's tokens, its end token included."""
        end = self._tokenizer.eos_token_id
        if end is None:
            raise InvalidRequest("model: its tokenizer has no end-of-text token", field="model")
        return (*self._tokenizer(text, add_special_tokens=False)["input_ids"], end)

    def _prompt(self, question: Question) -> tuple[int, ...]:
        row = question.row
        try:
            return tuple(encode_chat(self._tokenizer, row.messages, question.contender.template))
        except InvalidRequest as error:
            raise error.within(row.where) from None

    def _chosen(self, contender: Contender) -> tuple[AdapterChoice, ...]:
        adapter = contender.adapter
        if adapter is None:
            return ()
        if not self._engine.has_adapter(adapter.digest):
            self._engine.load_adapter(adapter)
        return (AdapterChoice(adapter.digest, contender.strength),)


@dataclass
class _Asked:
    """One question while its requests run."""

    place: int
    question: Question
    parts: dict[str, tuple[int, ...]]
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
        logprobs = tuple(
            self._logprob(str(n)) for n in range(len(row.candidates) if wanted.choice else 0)
        )
        loss, num_tokens = 0.0, 0
        if wanted.loss:
            name = _LOSS if _LOSS in self.parts else _place_in(row)
            loss, num_tokens = -self._logprob(name), len(self.parts[name])
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return Reply(text, self.finish_reason, logprobs, loss, num_tokens)

    def _logprob(self, name: str) -> float:
        return math.fsum(token.logprob or 0.0 for token in self.tokens[name])


def _place_in(row: Row) -> str:
    """The name of the candidate that is the row's reference."""
    return str(row.candidates.index(row.references[0]))


def _place_of(request_id: str) -> int:
    return int(request_id.split("/")[1])
