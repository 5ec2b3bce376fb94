"""Labels or values by an encoder: the trained head in an adapter's file says what it knows."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reft_core.classification.encoder_engine import EncoderEngine
from reft_core.classification.interface import (
    Classification,
    ClassificationSink,
    TextRequest,
    TextTicket,
)
from reft_core.classification.labels import as_shown, as_written
from reft_core.engine.admission import check_length
from reft_core.errors import InvalidRequest, ReftError
from reft_core.spec import TaskSpec
from reft_core.templates import encode_pair


class EncoderClassifier:
    """Asks trained heads on an encoder. Implements :class:`interface.Classifier`.

    Exactly one adapter of a text has a head. The text, or the pair, gets the special tokens that
    the encoder's tokenizer puts around it.
    """

    def __init__(self, engine: EncoderEngine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = engine
        self._tokenizer = tokenizer

    def submit(self, request: TextRequest, sink: ClassificationSink) -> TextTicket:
        """Accept a text; see :meth:`interface.Classifier.submit`."""
        tokens, segments = encode_pair(self._tokenizer, request.text, request.text_pair)
        if request.max_tokens is not None:
            check_length("input", len(tokens), request.max_tokens)
        task = self._task(request)
        known = task.labels or ()
        labels = request.labels or as_shown(known)
        written = as_written(labels, known)
        if request.labels and task.kind == "regression":
            raise InvalidRequest.because("labels", labels, "none: the head says a number")
        for label in written:
            if known and label not in known:
                allowed = f"some of {', '.join(known)}, which the head was trained on"
                raise InvalidRequest.because("labels", label, allowed)

        def finish(outcome: Tensor | ReftError) -> None:
            if isinstance(outcome, ReftError):
                sink(outcome)
                return
            if task.kind == "regression":
                sink(Classification((), (), value=outcome.item()))
                return
            logprobs = dict(zip(known, outcome.double().log_softmax(-1).tolist(), strict=True))
            sink(Classification(labels, tuple(logprobs[label] for label in written)))

        ticket = self.engine.submit(
            request.request_id, tokens, request.adapters, finish, request.deadline_s, segments
        )
        return TextTicket(request.request_id, ticket.num_prompt_tokens, 0, ticket.num_edits)

    def cancel(self, request_id: str) -> None:
        """Drop a text; see :meth:`interface.Classifier.cancel`."""
        self.engine.cancel(request_id)

    def _task(self, request: TextRequest) -> TaskSpec:
        """What the head is for; the engine refuses a request without one head."""
        specs = [self.engine.adapter_spec(choice.digest) for choice in request.adapters]
        return next((spec.task for spec in specs if spec.head), TaskSpec())
