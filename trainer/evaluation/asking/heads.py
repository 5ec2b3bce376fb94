"""Asks the trained heads of adapters on an encoder."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reft_core.adapter import Adapter
from reft_core.classification import EncoderEngine
from reft_core.engine.interface import AdapterChoice
from reft_core.errors import EngineOverloaded, InvalidRequest, ReftError
from reft_core.templates import encode_pair
from trainer.evaluation.asking.interface import Contender, Question, Reply
from trainer.evaluation.rows import Row


class HeadAsker:
    """Implements :class:`interface.Asker` on an encoder's engine that has been started.

    The greedy answer is the head's likeliest label, or its number where it has one output; the
    loss is that of the right label, as one token.
    """

    def __init__(self, engine: EncoderEngine, tokenizer: PreTrainedTokenizerBase) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """See :meth:`interface.Asker.ask`."""
        outcomes: queue.SimpleQueue[tuple[int, Tensor | ReftError]] = queue.SimpleQueue()
        run = uuid.uuid4().hex
        open_places: set[int] = set()
        next_place = 0
        try:
            while next_place < len(questions) or open_places:
                while next_place < len(questions):
                    try:
                        self._submit(f"{run}/{next_place}", questions, next_place, outcomes)
                    except EngineOverloaded:
                        if not open_places:
                            raise
                        break
                    open_places.add(next_place)
                    next_place += 1
                place, outcome = outcomes.get()
                open_places.discard(place)
                question = questions[place]
                if isinstance(outcome, ReftError):
                    raise outcome.within(question.row.where)
                yield place, _reply(question, outcome)
        finally:
            for place in open_places:
                self._engine.cancel(f"{run}/{place}")

    def _submit(
        self,
        request_id: str,
        questions: Sequence[Question],
        place: int,
        outcomes: queue.SimpleQueue[tuple[int, Tensor | ReftError]],
    ) -> None:
        question = questions[place]
        adapter = _headed(question.contender)
        if not self._engine.has_adapter(adapter.digest):
            self._engine.load_adapter(adapter)
        tokens, segments = encode_pair(self._tokenizer, *_texts(question.row))
        chosen = (AdapterChoice(adapter.digest, question.contender.strength),)
        try:
            self._engine.submit(
                request_id,
                tokens,
                chosen,
                lambda outcome: outcomes.put((place, outcome)),
                segments=segments,
            )
        except InvalidRequest as error:
            raise error.within(question.row.where) from None


def _headed(contender: Contender) -> Adapter:
    adapter = contender.adapter
    if adapter is None or adapter.head is None:
        expected = "an adapter with a trained head; an encoder alone answers nothing"
        raise InvalidRequest.because("adapter", contender.name, expected)
    return adapter


def _texts(row: Row) -> tuple[str, ...]:
    return row.texts or (row.question,)


def _reply(question: Question, logits: Tensor) -> Reply:
    """From a head's logits (L,)."""
    row, known = question.row, _headed(question.contender).spec.task.labels or ()
    if len(logits) == 1:
        return Reply(text=f"{float(logits[0]):.6f}", finish_reason="stop")
    if row.is_number:
        raise InvalidRequest.because(
            "data", f"{row.where}: {row.answer}", f"one of the head's labels, {', '.join(known)}"
        )
    logprobs = logits.double().log_softmax(-1).tolist()
    by_label = {label.strip(): logprob for label, logprob in zip(known, logprobs, strict=True)}
    for label in (*row.choices, row.answer):
        if label.strip() not in by_label:
            expected = f"some of the head's labels, {', '.join(known)}"
            raise InvalidRequest.because(f"{row.where}: label", label, expected)
    found = tuple(by_label[choice.strip()] for choice in row.choices)
    best = known[logprobs.index(max(logprobs))]
    loss = -by_label[row.answer.strip()] if question.wanted.loss else 0.0
    return Reply(best, "stop", found if question.wanted.choice else (), loss, 1)
