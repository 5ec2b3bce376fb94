"""From prompts to pieces of text: hold the adapters, submit, detokenise.

The bridge between the event loop and the engine's thread. Whatever happens to a request
(end, stop string, error, client gone), its sub-requests are cancelled and its adapter is
given back, once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from reft_core.engine.interface import Engine, Output, Request, SamplingParams
from reft_core.errors import ReftError
from reft_core.grammar import Grammar
from reft_core.vocabulary import Vocabulary
from server.adapters.residency import Residency
from server.answering.choice import ChoiceText, TokenText
from server.answering.echo import Echo, ScoredPrompt
from server.answering.holding import Held
from server.answering.job import Job
from server.answering.named import Resolved
from server.answering.outbox import Outbox
from server.answering.running import AnswerEnd, Delta, RunningChoice
from server.observability.adapter_usage import Key, keys_of
from server.observability.metrics import Metrics
from server.observability.record import current_record


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
class Backend:
    """What all generations of a server work with."""

    engine: Engine
    residency: Residency
    vocabulary: Vocabulary
    metrics: Metrics
    timeout_s: float | None
    """Seconds after which a choice ends with :class:`DeadlineExceeded`."""
    max_answer_tokens: int | None = None
    """Of an answer that may otherwise grow to the end of the context."""


class Generation:
    """A running job: an iterator of deltas, and what is known about it as a whole.

    Belongs to the event loop that started it.
    """

    def __init__(
        self,
        backend: Backend,
        job: Job,
        models: list[AnsweringModel],
        echoes: list[Echo],
        arrived_at: float,
        outbox: Outbox,
    ) -> None:
        self.models = models
        """Those that answer, in order."""
        self.fans_out = job.answering.beside is not None
        """Whether the request asked for several models, be it a list of one."""
        self.prompts = [prompt for model in self.models for prompt in model.prompts]
        """Every prompt of every model, model by model."""
        self.echoes = echoes
        """Of each prompt, if answers begin with it."""
        self.scored: dict[int, ScoredPrompt] = {}
        """By prompt, if that was asked for; known before a delta of its choices comes."""
        self.n = job.n
        self._job = job
        self._backend = backend
        self._held = Held(backend.residency)
        self._arrived_at = arrived_at
        self._outbox = outbox
        self._choices: list[RunningChoice] = []
        self._outputs: asyncio.Queue[tuple[RunningChoice, Output]] = asyncio.Queue()
        self._failed = False
        self._closed = False
        self._counted: list[tuple[Key, ...]] = []
        self._record = current_record()
        versions = [version for model in models for version in model.resolved.versions]
        self._record.model = job.answering.beside or models[0].name
        self._record.note_adapters(versions)
        self._record.params, self._record.num_choices = job.params, self.num_choices

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
        return sum(choice.num_tokens for choice in self._choices)

    async def hold(self) -> None:
        """Have the adapters of all models resident until :meth:`close`."""
        about = self._job.answering.about
        began_at = time.perf_counter()
        await self._held.take(
            (version, about(model.place))
            for model in self.models
            for version in model.resolved.versions
        )
        self._record.held = (began_at, time.perf_counter())

    def submit(self, grammar: Grammar | None) -> None:
        """Submit every choice of every prompt, to begin together; choice i of prompt p has index
        p·n + i. When one is refused, :meth:`close` takes the others back."""
        try:
            with self._backend.engine.together():
                for model in self.models:
                    with self._job.answering.about(model.place):
                        for prompt in model.prompts:
                            for i in range(self.n):
                                self._submit(model, prompt, i, grammar)
        except ReftError:
            self._failed = True
            raise
        for model in self.models:
            self._counted.append(keys_of(model.resolved.versions))
            self._backend.metrics.adapters.begin(self._counted[-1])

    def _submit(
        self, model: AnsweringModel, prompt: list[int], i: int, grammar: Grammar | None
    ) -> None:
        """Submit choice ``i`` of one prompt."""
        backend, job = self._backend, self._job
        with_tokens = job.params.logprobs is not None
        text = ChoiceText(backend.vocabulary, job.stops, with_tokens, job.with_stop_token)
        choice = RunningChoice(
            len(self._choices), text, backend.engine, backend.metrics, self._arrived_at
        )
        params = self._params(model.resolved.num_virtual_tokens + len(prompt), i)
        choice.num_prompt_tokens, choice.max_tokens = len(prompt), params.max_tokens
        request = Request(
            choice.request_id,
            tuple(prompt),
            params,
            model.resolved.choices,
            constraint=None if grammar is None else grammar.start(),
            priority=job.priority,
            tenant=job.caller.tenant,
            deadline_s=backend.timeout_s,
        )
        ticket = backend.engine.submit(request, self._sink(choice))
        choice.num_edits = ticket.num_edits
        self._choices.append(choice)
        self._record.choices.append(choice.record)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas of all choices as they come. Raises what ended a choice early."""
        unscored: dict[int, list[tuple[RunningChoice, Output]]] = {}
        num_open = len(self._choices)
        while num_open:
            choice, output = await self._outputs.get()
            prompt, place = divmod(choice.index, self.n)
            ready = [(choice, output)]
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
                    num_open -= delta.finish_reason is not None
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
            choice.drop("error" if self._failed else "abort")
        self._held.release()
        for keys in self._counted:
            self._backend.metrics.adapters.end(keys)
        self._record.num_prompt_tokens = self.num_prompt_tokens
        self._record.num_cached_tokens = self.num_cached_tokens
        self._record.num_completion_tokens = self.num_completion_tokens
        self._record.num_edits = self.num_edits

    def _describe(self, prompt: int, output: Output) -> ScoredPrompt:
        """A prompt's log-probabilities for people. Slow for a long prompt."""
        others = [token for token in output.prompt_logprobs if token is not None]
        offsets = self.echoes[prompt].offsets if self.echoes else ()
        vocabulary = self._backend.vocabulary
        return ScoredPrompt.of(vocabulary, self.prompts[prompt][0], others, offsets)

    def _params(self, num_taken: int, i: int) -> SamplingParams:
        """Sampling of choice ``i`` of a prompt that takes so many tokens of the context."""
        params = self._job.params
        if i:
            params = replace(params, prompt_logprobs=None)
        if self._job.fill_context:
            room = self._backend.engine.max_model_len - num_taken
            room = min(room, self._backend.max_answer_tokens or room)
            params = replace(params, max_tokens=max(1, room))
        if params.seed is not None and i:
            params = replace(params, seed=params.seed + i)
        return params

    def _sink(self, choice: RunningChoice) -> Callable[[Output], None]:
        """Carries outputs from the engine's thread to the event loop."""

        def receive(output: Output) -> None:
            choice.observe(output)
            if not choice.ended:
                if output.token is not None:
                    self._job.caller.charge(0, 1)
                self._outputs.put_nowait((choice, output))

        def sink(output: Output) -> None:
            try:
                self._outbox.put(receive, output)
            except RuntimeError:  # the loop is closed: nobody is left to tell
                self._backend.engine.cancel(output.request_id)

        return sink

    def _advance(self, choice: RunningChoice, output: Output) -> Delta | None:
        """The delta an output makes of its choice, if there is anything to show."""
        try:
            return choice.advance(output)
        except ReftError as error:
            self._failed = True
            self._record.error = type(error).__name__
            with self._job.answering.about(self.model_of(choice.index).place):
                raise
