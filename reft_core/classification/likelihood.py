"""Classification by a causal model: which label it finds the likeliest as its answer.

Each label is a request of its own whose completion is given. They share the prompt, which the
engine computes once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from reft_core.classification.interface import (
    Classification,
    ClassificationSink,
    TextRequest,
    TextTicket,
)
from reft_core.classification.labels import as_shown, as_written, label_tokens
from reft_core.engine.admission import check_length
from reft_core.engine.interface import AdapterChoice, Engine, Output, Request, SamplingParams
from reft_core.errors import EngineUnavailable, InvalidRequest, ReftError
from reft_core.templates import encode_chat

_SCORE = SamplingParams(temperature=0, logprobs=0)


class LikelihoodClassifier:
    """Scores labels on a causal engine. Implements :class:`interface.Classifier`.

    The text is one user message, in the first adapter's template if it brings one.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._open: dict[str, _Scoring] = {}

    def submit(self, request: TextRequest, sink: ClassificationSink) -> TextTicket:
        """Accept a text; see :meth:`interface.Classifier.submit`."""
        if request.text_pair is not None:
            expected = "none: a causal model reads one message"
            raise InvalidRequest.because("text_pair", request.text_pair, expected)
        own = _labels_of(self.engine, request.adapters)
        labels = request.labels or as_shown(own)
        if not labels:
            expected = "at least one, since no adapter brings any"
            raise InvalidRequest.because("labels", None, expected)
        answers = label_tokens(self._tokenizer, as_written(labels, own))
        prompt = self._prompt(request)
        if request.max_tokens is not None:
            check_length("input", len(prompt), request.max_tokens)
        scoring = _Scoring(request.request_id, labels, sink, self._close)
        with self._lock:
            if request.request_id in self._open:
                raise InvalidRequest.because("request_id", request.request_id, "an unused id")
            self._open[request.request_id] = scoring
        num_edits = 0
        try:
            with self.engine.together():
                for place, answer in enumerate(answers):
                    scored = Request(
                        scoring.part_id(place),
                        prompt,
                        _SCORE,
                        request.adapters,
                        answer,
                        tenant=request.tenant,
                        deadline_s=request.deadline_s,
                    )
                    num_edits += self.engine.submit(scored, scoring.sink_of(place)).num_edits
                    if scoring.closed:  # dropped meanwhile, perhaps before this label was there
                        self.engine.cancel(scored.request_id)
        except BaseException:
            self._close(scoring)
            raise
        num_label_tokens = sum(map(len, answers))
        return TextTicket(request.request_id, len(prompt), num_label_tokens, num_edits)

    def cancel(self, request_id: str) -> None:
        """Drop a text; see :meth:`interface.Classifier.cancel`."""
        with self._lock:
            scoring = self._open.get(request_id)
        if scoring is not None:
            self._close(scoring)

    def _prompt(self, request: TextRequest) -> tuple[int, ...]:
        """The text as the model is asked it."""
        template = None
        if request.adapters and not request.base_template:
            template = self.engine.adapter_spec(request.adapters[0].digest).template
        messages = [{"role": "user", "content": request.text}]
        return tuple(encode_chat(self._tokenizer, messages, template))

    def _close(self, scoring: _Scoring) -> bool:
        """Forget a text, and end what still runs of it; False if that has happened before."""
        with self._lock:
            if self._open.get(scoring.request_id) is not scoring:
                return False
            del self._open[scoring.request_id]
        scoring.closed = True
        for place in scoring.running:
            self.engine.cancel(scoring.part_id(place))
        return True


class _Scoring:
    """One text, while its labels are scored. Its sinks run on the engine's thread."""

    def __init__(
        self,
        request_id: str,
        labels: tuple[str, ...],
        sink: ClassificationSink,
        close: Callable[[_Scoring], bool],
    ) -> None:
        self.request_id = request_id
        self.closed = False
        self.running = list(range(len(labels)))
        """Places of the labels that have no score yet."""
        self._labels = labels
        self._sink = sink
        self._close = close
        self._tokens: list[list[float]] = [[] for _ in labels]
        self._num_cached: int | None = None

    def part_id(self, place: int) -> str:
        """Id of the request that scores one label."""
        return f"{self.request_id}/{place}"

    def sink_of(self, place: int) -> Callable[[Output], None]:
        """Adds up one label's tokens."""

        def sink(output: Output) -> None:
            if self.closed:
                return
            if output.finish_reason in ("error", "cancelled"):
                unavailable = EngineUnavailable("the engine cancelled the request")
                self._end(output.error or unavailable)
                return
            assert output.token is not None
            assert output.token.logprob is not None
            self._tokens[place].append(output.token.logprob)
            if output.finish_reason is not None:
                self._finish(place, output.num_cached_tokens)

        return sink

    def _finish(self, place: int, num_cached: int) -> None:
        """Note that a label has all of its tokens; the last one to end makes the outcome.

        What the text took from elsewhere is what its first label did: the others take from that.
        """
        self.running = [other for other in self.running if other != place]
        if place == 0:
            self._num_cached = num_cached
        if not self.running:
            logprobs = tuple(math.fsum(tokens) for tokens in self._tokens)
            self._end(Classification(self._labels, logprobs, self._num_cached or 0))

    def _end(self, outcome: Classification | ReftError) -> None:
        if self._close(self):  # else it was cancelled, perhaps just now
            self._sink(outcome)


def _labels_of(engine: Engine, adapters: tuple[AdapterChoice, ...]) -> tuple[str, ...]:
    """Labels of the first adapter that has any, as it writes them."""
    for choice in adapters:
        if labels := engine.adapter_spec(choice.digest).task.labels:
            return labels
    return ()
