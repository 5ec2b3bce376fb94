"""Starts generations: resolve, tokenise, hold the adapters, submit."""

from __future__ import annotations

import asyncio
import time

from transformers import PreTrainedTokenizerBase

from reft_core.engine.admission import check_length
from reft_core.engine.interface import Engine
from reft_core.errors import InvalidRequest
from reft_core.spec import TemplateSpec
from reft_core.vocabulary import Vocabulary
from server.adapters.residency import Residency
from server.answering.echo import Echo, echo_of
from server.answering.generation import AnsweringModel, Backend, Generation
from server.answering.grammars import Grammars
from server.answering.inline import InlineReader
from server.answering.job import Job
from server.answering.named import resolve_all
from server.answering.outbox import Outbox
from server.observability.metrics import Metrics
from server.observability.record import current_record
from server.registry import Registry


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
        inline: InlineReader,
        timeout_s: float | None = None,
        *,
        max_prompt_tokens: int | None = None,
        max_answer_tokens: int | None = None,
        max_prompt_logprobs: int | None = None,
    ) -> None:
        vocabulary = Vocabulary(tokenizer)
        self._backend = Backend(
            engine, residency, vocabulary, metrics, timeout_s, max_answer_tokens
        )
        self._max_prompt_tokens = max_prompt_tokens
        self._max_prompt_logprobs = max_prompt_logprobs
        self._registry = registry
        self._inline = inline
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._outbox: Outbox | None = None

    async def start(self, job: Job) -> Generation:
        """Accept a job and submit all of it. The caller must close what it gets.

        Raises what makes a request unacceptable; then nothing is left behind.
        """
        arrived_at = time.perf_counter()
        models, echoes = await asyncio.to_thread(self._prepare, job)
        grammar = await self._grammars.get(job.grammar) if job.grammar else None
        if self._outbox is None:
            self._outbox = Outbox(asyncio.get_running_loop())
        current_record().resolved = (arrived_at, time.perf_counter())
        generation = Generation(self._backend, job, models, echoes, arrived_at, self._outbox)
        num_tokens = generation.num_prompt_tokens
        job.caller.reserve(num_tokens)
        try:
            await generation.hold()
            generation.submit(grammar)
        except BaseException:
            job.caller.give_back(num_tokens)
            generation.close()
            raise
        job.caller.charge(num_tokens, 0, reserved=True)
        return generation

    def _prepare(self, job: Job) -> tuple[list[AnsweringModel], list[Echo]]:
        """The models that answer with their prompts, and the echo of each prompt of each model.

        Blocks on the catalog and tokenizer. Prompts are rendered with each model's own template.
        """
        models: list[AnsweringModel] = []
        rendered: dict[TemplateSpec | None, list[list[int]]] = {}
        for place, resolved in enumerate(
            resolve_all(
                job.answering, self._registry, self._inline, self._tokenizer, job.caller.principal
            )
        ):
            template = resolved.versions[0].spec.template if resolved.leads else None
            if template not in rendered:
                with job.answering.about(place):
                    rendered[template] = job.encode(self._tokenizer, template)
                    for prompt in rendered[template]:
                        if self._max_prompt_tokens is not None:
                            check_length("prompt", len(prompt), self._max_prompt_tokens)
            name = job.answering.named[place][0].model
            models.append(AnsweringModel(place, name, resolved, rendered[template]))
        self._check_scores(job, models)
        echoes = self._echoes(job, models[0].prompts) * len(models)  # raw prompts, alike for all
        return models, echoes

    def _check_scores(self, job: Job, models: list[AnsweringModel]) -> None:
        """Raise :class:`InvalidRequest` if too many log-probabilities of prompts are asked for."""
        num_top, most = job.params.prompt_logprobs, self._max_prompt_logprobs
        if num_top is None or most is None:
            return
        num_tokens = sum(len(prompt) for model in models for prompt in model.prompts) * job.n
        if (total := num_tokens * (1 + num_top)) > most:
            raise InvalidRequest.because(
                "prompt",
                f"{num_tokens} tokens over all choices x (1 + {num_top}) = {total}",
                f"at most {most} log-probabilities of prompts in one answer",
            )

    def _echoes(self, job: Job, prompts: list[list[int]]) -> list[Echo]:
        """The prompts' echoes, if answers begin with them."""
        vocabulary = self._backend.vocabulary
        pairs = zip(prompts, job.echoed, strict=True) if job.echoed else ()
        if job.params.prompt_logprobs is not None:
            return [echo_of(vocabulary, prompt, text) for prompt, text in pairs]
        return [Echo(vocabulary.decode(prompt) if text is None else text) for prompt, text in pairs]
