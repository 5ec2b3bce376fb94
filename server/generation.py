"""From a request to its pieces of text: resolve, tokenise, submit, detokenise.

The bridge between the event loop and the engine's thread. Whatever happens to a request
(end, stop string, error, client gone), its sub-requests are cancelled and its adapter is
given back, once.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from reft_core.engine.interface import AdapterChoice, Engine, Output, Request, SamplingParams
from reft_core.errors import EngineUnavailable, RequestFailed
from reft_core.grammar import Grammar, GrammarSpec
from reft_core.spec import TemplateSpec
from server.choice import ChoiceText, Piece, TokenText
from server.echo import Echo, ScoredPrompt, echo_of
from server.grammars import Grammars
from server.metrics import Metrics
from server.named import NamedAdapter, Resolved, resolve
from server.registry import Registry, Version
from server.residency import Residency
from server.vocabulary import Vocabulary

Encode = Callable[[PreTrainedTokenizerBase, TemplateSpec | None], list[list[int]]]
"""Renders and tokenises a request's prompts, given the adapter's own template if it has one."""

AnswerEnd = Literal["stop", "length"]


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks for."""

    named: tuple[NamedAdapter, ...]
    """What ``model`` names, perhaps the base model, then the adapters stacked on it."""
    encode: Encode
    params: SamplingParams
    """Of each choice; choice i samples with ``seed + i``."""
    fill_context: bool = False
    """Let answers grow to the end of the context instead of ``params.max_tokens``."""
    n: int = 1
    stops: tuple[str, ...] = ()
    priority: int = 0
    grammar: GrammarSpec | None = None
    """What every answer must look like."""
    echoed: tuple[str | None, ...] = ()
    """The prompts' texts, None for tokens, if answers are to begin with them."""
    with_stop_token: bool = False
    """Report log-probabilities also of a token that ends an answer."""


@dataclass(frozen=True)
class Delta:
    """The next piece of one choice; the last of a choice has ``finish_reason``."""

    index: int
    piece: Piece
    finish_reason: AnswerEnd | None = None


@dataclass
class FinishedChoice:
    """A whole choice."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish_reason: AnswerEnd | None = None


@dataclass(frozen=True)
class _Prepared:
    """What a job needs before it can be submitted."""

    resolved: Resolved
    prompts: list[list[int]]
    echoes: list[Echo]


@dataclass
class _Choice:
    """One sub-request in the engine."""

    request_id: str
    text: ChoiceText
    num_cached_tokens: int = 0
    last_token_at: float | None = None
    ended: bool = False
    """No more of its outputs are wanted."""


class Generator:
    """Starts generations on one engine."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        residency: Residency,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Metrics,
        grammars: Grammars,
        timeout_s: float | None = None,
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._timeout_s = timeout_s
        self._registry = registry
        self._residency = residency
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._vocabulary = Vocabulary(tokenizer)

    async def start(self, job: Job) -> Generation:
        """Accept a job and submit all of it. The caller must close what it gets.

        Raises what makes a request unacceptable; then nothing is left behind.
        """
        arrived_at = time.perf_counter()
        prepared = await asyncio.to_thread(self._prepare, job)
        grammar = await self._grammars.get(job.grammar) if job.grammar else None
        generation = Generation(self, job, prepared, arrived_at)
        try:
            for version in prepared.resolved.versions:
                await self._residency.acquire(version.digest, version.resident_bytes)
                generation.versions.append(version)
            generation.submit(prepared.resolved.choices, grammar)
        except BaseException:
            generation.close()
            raise
        return generation

    def _prepare(self, job: Job) -> _Prepared:
        """Resolve the adapters and tokenise. Blocks on the catalog and tokenizer.

        The prompt is rendered with the template of what ``model`` names.
        """
        resolved = resolve(job.named, self._registry, self._tokenizer)
        template = resolved.versions[0].spec.template if resolved.leads else None
        prompts = job.encode(self._tokenizer, template)
        return _Prepared(resolved, prompts, self._echoes(job, prompts))

    def _echoes(self, job: Job, prompts: list[list[int]]) -> list[Echo]:
        """The prompts' echoes, if answers begin with them."""
        pairs = zip(prompts, job.echoed, strict=True) if job.echoed else ()
        if job.params.prompt_logprobs is not None:
            return [echo_of(self._vocabulary, prompt, text) for prompt, text in pairs]
        return [
            Echo(self._vocabulary.decode(prompt) if text is None else text)
            for prompt, text in pairs
        ]


class Generation:
    """A running job: an iterator of deltas, and what is known about it as a whole.

    Belongs to the event loop that started it.
    """

    def __init__(
        self,
        generator: Generator,
        job: Job,
        prepared: _Prepared,
        arrived_at: float,
    ) -> None:
        self.versions: list[Version] = []
        """The adapters it holds, in the order they act."""
        self.starts_with_adapter = prepared.resolved.leads
        """Whether ``model`` named an adapter, and not the base model."""
        self.prompts = prepared.prompts
        self.echoes = prepared.echoes
        """Of each prompt, if answers begin with it."""
        self.scored: dict[int, ScoredPrompt] = {}
        """By prompt, if that was asked for; known before a delta of its choices comes."""
        self.n = job.n
        self.num_edits = 0
        """(layer, site, position) triples the adapters change, over all sub-requests."""
        self._job = job
        self._owner = generator
        self._arrived_at = arrived_at
        self._loop = asyncio.get_running_loop()
        self._choices: list[_Choice] = []
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._closed = False

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of all prompts that the first choice of each took from the prefix cache."""
        return sum(choice.num_cached_tokens for choice in self._choices[:: self.n])

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.text.num_tokens for choice in self._choices)

    def submit(self, adapters: tuple[AdapterChoice, ...], grammar: Grammar | None) -> None:
        """Submit every choice of every prompt; choice i of prompt p has index p·n + i."""
        owner, job = self._owner, self._job
        for prompt in self.prompts:
            for i in range(self.n):
                index = len(self._choices)
                choice = _Choice(
                    uuid.uuid4().hex,
                    ChoiceText(
                        owner._vocabulary,
                        job.stops,
                        job.params.logprobs is not None,
                        job.with_stop_token,
                    ),
                )
                request = Request(
                    choice.request_id,
                    tuple(prompt),
                    self._params(len(prompt), i),
                    adapters,
                    constraint=None if grammar is None else grammar.start(),
                    priority=job.priority,
                    deadline_s=owner._timeout_s,
                )
                ticket = owner._engine.submit(request, self._sink(index, choice))
                self._choices.append(choice)
                self.num_edits += ticket.num_edits

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas of all choices as they come. Raises what ended a choice early."""
        held: dict[int, list[tuple[int, Output]]] = {}
        while not all(choice.ended for choice in self._choices):
            index, output = await self._outputs.get()
            prompt, place = divmod(index, self.n)
            ready = [(index, output)]
            if self._job.params.prompt_logprobs is not None and prompt not in self.scored:
                if place > 0:  # the first choice brings the prompt's scores for all
                    held.setdefault(prompt, []).extend(ready)
                    continue
                if output.prompt_logprobs:
                    self.scored[prompt] = await asyncio.to_thread(self._describe, prompt, output)
                    ready += held.pop(prompt, [])
            for pair in ready:
                delta = self._advance(*pair)
                if delta is not None:
                    yield delta

    async def collect(self) -> list[FinishedChoice]:
        """Every choice, whole, in order of index."""
        whole = [FinishedChoice() for _ in self._choices]
        async for delta in self:
            choice = whole[delta.index]
            choice.text += delta.piece.text
            choice.tokens += delta.piece.tokens
            choice.finish_reason = delta.finish_reason
        return whole

    def close(self) -> None:
        """Cancel whatever still runs and give the adapter back. May be called again."""
        if self._closed:
            return
        self._closed = True
        for choice in self._choices:
            if not choice.ended:
                self._end(choice, "abort")
                self._owner._engine.cancel(choice.request_id)
        for version in self.versions:
            self._owner._residency.release(version.digest)

    def _describe(self, prompt: int, output: Output) -> ScoredPrompt:
        """A prompt's log-probabilities for people. Slow for a long prompt."""
        others = [token for token in output.prompt_logprobs if token is not None]
        offsets = self.echoes[prompt].offsets if self.echoes else ()
        vocabulary = self._owner._vocabulary
        return ScoredPrompt.of(vocabulary, self.prompts[prompt][0], others, offsets)

    def _params(self, prompt_len: int, i: int) -> SamplingParams:
        """Sampling of choice ``i`` of a prompt."""
        params = self._job.params
        if i:
            params = replace(params, prompt_logprobs=None)
        if self._job.fill_context:
            room = self._owner._engine.max_model_len - prompt_len
            params = replace(params, max_tokens=max(1, room))
        if params.seed is not None and i:
            params = replace(params, seed=params.seed + i)
        return params

    def _sink(self, index: int, choice: _Choice) -> Callable[[Output], None]:
        """Carries outputs from the engine's thread to the event loop."""

        def sink(output: Output) -> None:
            try:
                self._loop.call_soon_threadsafe(self._receive, index, choice, output)
            except RuntimeError:  # the loop is closed: nobody is left to tell
                self._owner._engine.cancel(output.request_id)

        return sink

    def _receive(self, index: int, choice: _Choice, output: Output) -> None:
        """Note the time of an output, and queue it if it is still wanted."""
        metrics, now = self._owner._metrics, time.perf_counter()
        if output.token is not None:
            if choice.last_token_at is None:
                metrics.observe_first_token(now - self._arrived_at)
            else:
                metrics.observe_gap(now - choice.last_token_at)
            choice.last_token_at = now
        if output.timings is not None:
            metrics.observe_stages(output.timings)
        if not choice.ended:
            self._outputs.put_nowait((index, output))

    def _advance(self, index: int, output: Output) -> Delta | None:
        """The delta an output makes of its choice, if there is anything to show."""
        choice = self._choices[index]
        if choice.ended:
            return None
        choice.num_cached_tokens = output.num_cached_tokens
        reason = output.finish_reason
        has_answer = output.token is not None or reason == "length"
        if not has_answer or reason in ("error", "cancelled"):
            self._end(choice, "error")
            if output.error is not None:
                raise output.error
            if reason == "cancelled":
                raise EngineUnavailable("the engine cancelled the request")
            raise RequestFailed("the engine ended the request without saying why")
        is_last = reason is not None
        piece = Piece()
        if output.token is not None:
            hidden = reason == "stop" and not output.completes_constraint
            piece = choice.text.push(output.token, is_last=is_last, hidden=hidden)
        end: AnswerEnd | None = None
        if choice.text.stopped or reason == "stop":
            end = "stop"
        elif reason == "length":
            end = "length"
        if end is not None:
            self._end(choice, end)
            if not is_last:
                self._owner._engine.cancel(choice.request_id)
        if end is None and not piece.text and not piece.tokens:
            return None
        return Delta(index, piece, end)

    def _end(self, choice: _Choice, reason: str) -> None:
        """Take no more outputs of ``choice``."""
        choice.ended = True
        self._owner._metrics.observe_end(reason, time.perf_counter() - self._arrived_at)
