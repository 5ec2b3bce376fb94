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

from reft_core.engine.interface import Engine, Output, Request, SamplingParams
from reft_core.errors import EngineUnavailable, InvalidRequest, ReftError, RequestFailed
from reft_core.grammar import Grammar, GrammarSpec
from reft_core.spec import TemplateSpec
from server.choice import ChoiceText, Piece, TokenText
from server.echo import Echo, ScoredPrompt, echo_of
from server.grammars import Grammars
from server.metrics import Metrics
from server.named import Answering, Resolved, resolve_all
from server.registry import Registry, Version
from server.residency import Residency
from server.vocabulary import Vocabulary

Encode = Callable[[PreTrainedTokenizerBase, TemplateSpec | None], list[list[int]]]
"""Renders and tokenises a request's prompts, given the adapter's own template if it has one."""

AnswerEnd = Literal["stop", "length"]


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks for."""

    answering: Answering
    encode: Encode
    params: SamplingParams
    """Of each choice; choice i samples with ``seed + i``."""
    fill_context: bool = False
    """Let answers grow to the end of the context instead of ``params.max_tokens``."""
    n: int = 1
    """Choices that each model gives to each prompt."""
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


@dataclass(frozen=True, eq=False)
class AnsweringModel:
    """A model that answers, and the prompts as its template renders them."""

    place: int
    name: str
    """As the request has it."""
    resolved: Resolved
    prompts: list[list[int]]


@dataclass(frozen=True)
class _Prepared:
    """What a job needs before it can be submitted."""

    models: list[AnsweringModel]
    echoes: list[Echo]
    """Of each prompt of each model."""


@dataclass
class _Choice:
    """One sub-request in the engine."""

    request_id: str
    text: ChoiceText
    num_edits: int = 0
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
            await self._hold(prepared.models, job.answering, generation.held)
            generation.submit(grammar)
        except BaseException:
            generation.close()
            raise
        return generation

    def _prepare(self, job: Job) -> _Prepared:
        """Resolve the adapters and tokenise. Blocks on the catalog and tokenizer.

        Prompts are rendered with the template of each model that answers.
        """
        models: list[AnsweringModel] = []
        rendered: list[tuple[TemplateSpec | None, list[list[int]]]] = []
        found = resolve_all(job.answering, self._registry, self._tokenizer)
        for place, resolved in enumerate(found):
            template = resolved.versions[0].spec.template if resolved.leads else None
            known = [prompts for other, prompts in rendered if other == template]
            if not known:
                with job.answering.about(place):
                    known = [job.encode(self._tokenizer, template)]
                rendered.append((template, known[0]))
            name = job.answering.named[place][0].model
            models.append(AnsweringModel(place, name, resolved, known[0]))
        echoes = self._echoes(job, models[0].prompts) * len(models)  # raw prompts, alike for all
        return _Prepared(models, echoes)

    async def _hold(
        self, models: list[AnsweringModel], answering: Answering, held: list[Version]
    ) -> None:
        """Have every adapter resident and put it into ``held``, those of several models at once."""
        places: dict[str, tuple[int, Version]] = {}
        for model in models:
            for version in model.resolved.versions:
                places.setdefault(version.digest, (model.place, version))
        self._check_room([version for _, version in places.values()])

        async def hold(place: int, version: Version) -> None:
            with answering.about(place):
                await self._residency.acquire(version.digest, version.resident_bytes)
            held.append(version)

        try:
            async with asyncio.TaskGroup() as group:
                for place, version in places.values():
                    group.create_task(hold(place, version))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def _check_room(self, versions: list[Version]) -> None:
        """Refuse adapters that never fit together, for which no waiting would make room."""
        total = sum(version.resident_bytes for version in versions)
        budget = self._residency.budget_bytes
        if len(versions) > 1 and total > budget:
            raise InvalidRequest.because(
                "reft",
                f"{len(versions)} adapters of {total} bytes",
                f"at most {budget} bytes together, the memory for adapters",
            )

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
        self.held: list[Version] = []
        """The adapters that it keeps in the engine, each once."""
        self.models = prepared.models
        """Those that answer, in order."""
        self.fans_out = job.answering.beside is not None
        """Whether the request asked for several models, be it a list of one."""
        self.prompts = [prompt for model in self.models for prompt in model.prompts]
        """Every prompt of every model, model by model."""
        self.echoes = prepared.echoes
        """Of each prompt, if answers begin with it."""
        self.scored: dict[int, ScoredPrompt] = {}
        """By prompt, if that was asked for; known before a delta of its choices comes."""
        self.n = job.n
        self._job = job
        self._owner = generator
        self._arrived_at = arrived_at
        self._loop = asyncio.get_running_loop()
        self._choices: list[_Choice] = []
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._failed = False
        self._closed = False

    @property
    def num_choices(self) -> int:
        """Choices of all models."""
        return len(self.prompts) * self.n

    @property
    def num_edits(self) -> int:
        """(layer, site, position) triples that adapters change, over all choices."""
        return sum(choice.num_edits for choice in self._choices)

    def num_edits_of(self, model: AnsweringModel) -> int:
        """The same over the choices of one model."""
        indices = range(self.num_choices)
        return sum(self._choices[i].num_edits for i in indices if self.model_of(i) is model)

    def choice_num_edits(self, index: int) -> int:
        """The same for one choice."""
        return self._choices[index].num_edits

    def model_of(self, index: int) -> AnsweringModel:
        """The model that gives a choice."""
        return self.models[index * len(self.models) // self.num_choices]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once for each model."""
        return sum(map(len, self.prompts))

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of all prompts that were not computed for the first choice of each."""
        return sum(choice.num_cached_tokens for choice in self._choices[:: self.n])

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.text.num_tokens for choice in self._choices)

    def submit(self, grammar: Grammar | None) -> None:
        """Submit every choice of every prompt, to begin together; choice i of prompt p has index
        p·n + i. When one is refused, :meth:`close` takes the others back."""
        try:
            with self._owner._engine.together():
                for model in self.models:
                    with self._job.answering.about(model.place):
                        for prompt in model.prompts:
                            for i in range(self.n):
                                self._submit(model, prompt, i, grammar)
        except ReftError:
            self._failed = True
            raise

    def _submit(
        self, model: AnsweringModel, prompt: list[int], i: int, grammar: Grammar | None
    ) -> None:
        """Submit choice ``i`` of one prompt."""
        owner, job = self._owner, self._job
        with_tokens = job.params.logprobs is not None
        text = ChoiceText(owner._vocabulary, job.stops, with_tokens, job.with_stop_token)
        choice = _Choice(uuid.uuid4().hex, text)
        request = Request(
            choice.request_id,
            tuple(prompt),
            self._params(model.resolved.num_virtual_tokens + len(prompt), i),
            model.resolved.choices,
            constraint=None if grammar is None else grammar.start(),
            priority=job.priority,
            deadline_s=owner._timeout_s,
        )
        ticket = owner._engine.submit(request, self._sink(len(self._choices), choice))
        choice.num_edits = ticket.num_edits
        self._choices.append(choice)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas of all choices as they come. Raises what ended a choice early."""
        unscored: dict[int, list[tuple[int, Output]]] = {}
        while not all(choice.ended for choice in self._choices):
            index, output = await self._outputs.get()
            prompt, place = divmod(index, self.n)
            ready = [(index, output)]
            if self._job.params.prompt_logprobs is not None and prompt not in self.scored:
                if place > 0:  # the first choice brings the prompt's scores for all
                    unscored.setdefault(prompt, []).extend(ready)
                    continue
                if output.prompt_logprobs:
                    self.scored[prompt] = await asyncio.to_thread(self._describe, prompt, output)
                    ready += unscored.pop(prompt, [])
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
        """Cancel whatever still runs and give the adapters back. May be called again."""
        if self._closed:
            return
        self._closed = True
        for choice in self._choices:
            if not choice.ended:
                self._end(choice, "error" if self._failed else "abort")
                self._owner._engine.cancel(choice.request_id)
        for version in self.held:
            self._owner._residency.release(version.digest)

    def _describe(self, prompt: int, output: Output) -> ScoredPrompt:
        """A prompt's log-probabilities for people. Slow for a long prompt."""
        others = [token for token in output.prompt_logprobs if token is not None]
        offsets = self.echoes[prompt].offsets if self.echoes else ()
        vocabulary = self._owner._vocabulary
        return ScoredPrompt.of(vocabulary, self.prompts[prompt][0], others, offsets)

    def _params(self, num_taken: int, i: int) -> SamplingParams:
        """Sampling of choice ``i`` of a prompt that takes so many tokens of the context."""
        params = self._job.params
        if i:
            params = replace(params, prompt_logprobs=None)
        if self._job.fill_context:
            room = self._owner._engine.max_model_len - num_taken
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
            self._failed = True
            self._end(choice, "error")
            with self._job.answering.about(self.model_of(index).place):
                raise _failure(output)
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


def _failure(output: Output) -> ReftError:
    """What ended a choice that has no answer."""
    if output.error is not None:
        return output.error
    if output.finish_reason == "cancelled":
        return EngineUnavailable("the engine cancelled the request")
    return RequestFailed("the engine ended the request without saying why")
