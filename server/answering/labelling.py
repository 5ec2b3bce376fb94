"""From texts to their labels: resolve, hold the adapters, ask the classifier.

The bridge between the event loop and the classifier's thread. Whatever happens to a request
(end, error, client gone), its texts are dropped and its adapters given back, once.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from reft_core.classification.interface import (
    Classification,
    Classifier,
    TextRequest,
    TextTicket,
)
from reft_core.errors import ReftError
from reft_core.templates import encode_text
from server.adapters.residency import Residency
from server.answering.holding import Held
from server.answering.inline import InlineReader
from server.answering.named import NamedAdapter, Resolved, UsedAdapter, resolve
from server.keys import FREE, Caller, Principal
from server.observability.adapter_usage import keys_of
from server.observability.metrics import Metrics
from server.observability.record import current_record
from server.registry import Registry

ChooseLabels = Callable[[Sequence[UsedAdapter]], list[str] | None]
"""Labels to choose from, given the adapters in play; None leaves it to the classifier."""


@dataclass(frozen=True)
class LabelJob:
    """What one request asks for."""

    named: tuple[NamedAdapter, ...]
    texts: tuple[tuple[str, str | None], ...]
    """Each with the second text of its pair, if it is one."""
    choose_labels: ChooseLabels
    caller: Caller = FREE
    """Whose names they are, and who pays."""


@dataclass(frozen=True)
class Labelled:
    """The texts' outcomes, in order, and what is known about the request as a whole."""

    outcomes: list[Classification]
    resolved: Resolved
    num_prompt_tokens: int
    num_label_tokens: int
    num_cached_tokens: int
    num_edits: int


class Labeller:
    """Runs jobs on one classifier."""

    def __init__(
        self,
        classifier: Classifier,
        registry: Registry,
        residency: Residency,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Metrics,
        inline: InlineReader,
        timeout_s: float | None = None,
        *,
        max_text_tokens: int | None = None,
    ) -> None:
        self._classifier = classifier
        self._registry = registry
        self._inline = inline
        self._residency = residency
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._max_text_tokens = max_text_tokens

    async def run(self, job: LabelJob) -> Labelled:
        """The whole outcome. Raises what makes the request, or any of its texts, fail."""
        arrived_at = time.perf_counter()
        job.caller.check_tokens(1)  # how many there are is known once they are submitted
        resolved = await asyncio.to_thread(self._resolve, job.named, job.caller.principal)
        requests = self._requests(job, resolved)
        record, keys = current_record(), keys_of(resolved.versions)
        record.resolved = (arrived_at, time.perf_counter())
        record.model = job.named[0].model
        record.note_adapters(resolved.versions)
        held = Held(self._residency)
        try:
            await held.take((version, nullcontext()) for version in resolved.versions)
            record.held = (record.resolved[1], time.perf_counter())
            self._metrics.adapters.begin(keys)
            try:
                labelled = await self._ask(requests, resolved, job.caller, arrived_at)
            finally:
                self._metrics.adapters.end(keys)
        finally:
            held.release()
        record.num_prompt_tokens = labelled.num_prompt_tokens
        record.num_cached_tokens = labelled.num_cached_tokens
        record.num_completion_tokens = labelled.num_label_tokens
        record.num_edits = labelled.num_edits
        return labelled

    def _resolve(self, named: Sequence[NamedAdapter], principal: Principal) -> Resolved:
        """What the names mean. Blocks on the catalog, inline adapters and the tokenizer."""
        encode = partial(encode_text, self._tokenizer)
        return resolve(named, self._registry, self._inline, encode, principal)

    def _requests(self, job: LabelJob, resolved: Resolved) -> list[TextRequest]:
        """What each text is asked."""
        labels = job.choose_labels(resolved.versions)
        return [
            TextRequest(
                uuid.uuid4().hex,
                text,
                resolved.choices,
                None if labels is None else tuple(labels),
                base_template=not resolved.leads,
                tenant=job.caller.tenant,
                deadline_s=self._timeout_s,
                max_tokens=self._max_text_tokens,
                text_pair=text_pair,
            )
            for text, text_pair in job.texts
        ]

    async def _ask(
        self, requests: list[TextRequest], resolved: Resolved, caller: Caller, arrived_at: float
    ) -> Labelled:
        """Submit every text and wait for all of them, or for the first that fails."""
        outcomes: asyncio.Queue[tuple[str, Classification | ReftError]] = asyncio.Queue()
        found: dict[str, Classification] = {}
        reason = "abort"
        dropped = threading.Event()
        sink_of = _sinks(asyncio.get_running_loop(), outcomes)

        def submit() -> list[TextTicket]:
            """In a thread, which goes on when the client has gone; hence the event."""
            tickets = []
            for request in requests:
                if dropped.is_set():
                    break
                tickets.append(self._classifier.submit(request, sink_of(request.request_id)))
                if dropped.is_set():
                    self._classifier.cancel(request.request_id)
            return tickets

        try:
            tickets = await asyncio.to_thread(submit)
            caller.charge(
                sum(ticket.num_prompt_tokens for ticket in tickets),
                sum(ticket.num_label_tokens for ticket in tickets),
            )
            while len(found) < len(requests):
                request_id, outcome = await outcomes.get()
                if isinstance(outcome, ReftError):
                    raise outcome
                found[request_id] = outcome
                self._metrics.observe_end("stop", time.perf_counter() - arrived_at)
        except ReftError:
            reason = "error"
            raise
        finally:
            dropped.set()
            for request in requests:
                if request.request_id not in found:
                    self._classifier.cancel(request.request_id)
                    self._metrics.observe_end(reason, time.perf_counter() - arrived_at)
        return Labelled(
            outcomes=[found[request.request_id] for request in requests],
            resolved=resolved,
            num_prompt_tokens=sum(ticket.num_prompt_tokens for ticket in tickets),
            num_label_tokens=sum(ticket.num_label_tokens for ticket in tickets),
            num_cached_tokens=sum(outcome.num_cached_tokens for outcome in found.values()),
            num_edits=sum(ticket.num_edits for ticket in tickets),
        )


def _sinks(
    loop: asyncio.AbstractEventLoop, outcomes: asyncio.Queue[tuple[str, Classification | ReftError]]
) -> Callable[[str], Callable[[Classification | ReftError], None]]:
    """Makes sinks that carry outcomes from the classifier's thread to the event loop."""

    def sink_of(request_id: str) -> Callable[[Classification | ReftError], None]:
        def sink(outcome: Classification | ReftError) -> None:
            try:
                loop.call_soon_threadsafe(outcomes.put_nowait, (request_id, outcome))
            except RuntimeError:  # the loop is closed: nobody is left to tell
                return

        return sink

    return sink_of
