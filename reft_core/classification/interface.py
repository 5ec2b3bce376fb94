"""What a classifier is to the rest of the project: texts in, the labels' log-probabilities out."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from reft_core.engine.interface import AdapterChoice, AdapterHost
from reft_core.errors import ReftError


@dataclass(frozen=True)
class TextRequest:
    """One text to classify, with any number of adapters."""

    request_id: str
    text: str
    adapters: tuple[AdapterChoice, ...] = ()
    """Applied in order."""
    labels: tuple[str, ...] | None = None
    """Labels to choose from; None: those that an adapter brings, without the space that its
    answers may begin with. One that it brings may be written either way. A trained head knows its
    own labels alone, so with one they must be some of these."""
    base_template: bool = False
    """Have a causal model read the text in its own chat template, whatever the first adapter
    brings. Encoders have no templates."""
    tenant: str = ""
    """See :class:`engine.interface.Request`; an encoder keeps nothing of a text."""
    deadline_s: float | None = None
    """Seconds from submission after which it ends with :class:`DeadlineExceeded`."""
    max_tokens: int | None = None
    """Most tokens of the text, as the model is given it; None: as many as the context holds."""
    text_pair: str | None = None
    """The second text of a pair, for encoders: a causal model reads one message."""


@dataclass(frozen=True)
class Classification:
    """How likely each label is, or the number that stands in place of labels."""

    labels: tuple[str, ...]
    """As the request writes them, or where it does not as people read them."""
    logprobs: tuple[float, ...]
    """Natural log of each label's probability: of a trained head, among all of its labels; of a
    causal model, that its answer begins with the label, or is the label where one begins another,
    so that these need not add up to 1."""
    num_cached_tokens: int = 0
    """Tokens of the text that were not computed for it; see :class:`engine.interface.Output`."""
    value: float | None = None
    """What a regression's head says; there are no labels then."""

    @property
    def probs(self) -> tuple[float, ...]:
        """Probability of each label, given that it is one of these."""
        top = max(self.logprobs, default=0.0)
        if top == -math.inf:
            return (1 / len(self.labels),) * len(self.labels)
        weights = [math.exp(logprob - top) for logprob in self.logprobs]
        total = math.fsum(weights)
        return tuple(weight / total for weight in weights)

    @property
    def best(self) -> str | None:
        """The likeliest label, the first of several alike; None of a regression."""
        if not self.labels:
            return None
        return self.labels[self.logprobs.index(max(self.logprobs))]


@dataclass(frozen=True)
class TextTicket:
    """Receipt of an accepted text."""

    request_id: str
    num_prompt_tokens: int
    num_label_tokens: int
    """Tokens whose probabilities are computed, over all labels; 0 with a trained head."""
    num_edits: int
    """(layer, site, position) triples that change, over all labels."""


ClassificationSink = Callable[[Classification | ReftError], None]
"""Receives a text's outcome, once, on the engine's thread. Must not block or raise."""


class Classifier(Protocol):
    """Chooses labels for texts, each with its own adapters, many at once.

    Adapters are loaded into :attr:`engine`, which must have been started. Every method may be
    called from any thread.
    """

    @property
    def engine(self) -> AdapterHost:
        """What runs the base model."""

    def submit(self, request: TextRequest, sink: ClassificationSink) -> TextTicket:
        """Tokenise and accept a text; ``sink`` gets its outcome.

        Raises without calling ``sink``: :class:`InvalidRequest` (no labels, an adapter that is
        not loaded or cannot answer), :class:`PromptTooLong`, :class:`EngineOverloaded`,
        :class:`EngineUnavailable`.
        """

    def cancel(self, request_id: str) -> None:
        """Drop a text: its sink is not called any more. No-op if it has its outcome."""


def classify(classifier: Classifier, requests: Sequence[TextRequest]) -> list[Classification]:
    """The outcomes of ``requests``, in their order. For scripts, evaluation and tests.

    Raises the first error, after the others were cancelled.
    """
    outcomes: queue.SimpleQueue[tuple[str, Classification | ReftError]] = queue.SimpleQueue()
    found: dict[str, Classification] = {}
    assert len({request.request_id for request in requests}) == len(requests), "ids must be unique"

    def sink_of(request_id: str) -> ClassificationSink:
        return lambda outcome: outcomes.put((request_id, outcome))

    try:
        for request in requests:
            classifier.submit(request, sink_of(request.request_id))
        while len(found) < len(requests):
            request_id, outcome = outcomes.get()
            if isinstance(outcome, ReftError):
                raise outcome
            found[request_id] = outcome
    except BaseException:
        for request in requests:
            classifier.cancel(request.request_id)
        raise
    return [found[request.request_id] for request in requests]
