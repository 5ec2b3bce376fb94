"""Asks an encoder-decoder in this process: greedy answers, and how likely given ones are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse
from reft_core.classification.labels import Tokens, counted
from reft_core.encoder import EncoderRequest
from reft_core.engine.admission import check_length
from reft_core.engine.choices import as_use
from reft_core.engine.interface import AdapterChoice
from reft_core.errors import InvalidRequest, ReftError
from reft_core.loading import LoadedModel
from reft_core.seq2seq import Seq2SeqGenerator
from reft_core.templates import encode_text, render_text
from trainer.data.templates import PLAIN_TEMPLATE
from trainer.evaluation.asking.interface import Contender, Question, Reply
from trainer.seq2seq.rows import encode_answer


class Seq2SeqAsker:
    """Implements :class:`interface.Asker`. Prompts and answers are tokenised as in training.

    A reference's likelihood is that of all of its tokens, those that the tokenizer adds included.
    """

    def __init__(self, loaded: LoadedModel, batch: int) -> None:
        self._tokenizer = loaded.tokenizer
        self._device = loaded.model.device
        self._generator = Seq2SeqGenerator(loaded)
        self._longest = self._generator.encoder.max_tokens
        self._batch = batch
        self._adapters: dict[str, Adapter] = {}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """See :meth:`interface.Asker.ask`. Every row is checked before the first is asked."""
        requests = [self._request(question) for question in questions]
        answers = [self._answers(question) for question in questions]
        for start in range(0, len(questions), self._batch):
            part = slice(start, start + self._batch)
            asked = questions[part]
            texts = self._texts(asked, requests[part])
            scores = self._generator.score(requests[part], answers[part])
            for place, question in enumerate(asked):
                of_row = answers[start + place]
                yield start + place, _reply(question, texts[place], scores[place], of_row)

    def _request(self, question: Question) -> EncoderRequest:
        """The conversation as its contender is given it. Raises what names the row."""
        row = question.row
        if not row.turns:
            expected = "rows that ask something: an encoder-decoder answers what it reads"
            raise InvalidRequest.because(row.where, "a text alone", expected)
        template = question.contender.template or PLAIN_TEMPLATE
        try:
            tokens = encode_text(self._tokenizer, render_text(template, row.messages))
            request = EncoderRequest(tuple(tokens), self._uses(question.contender))
            self._generator.check(request)
        except ReftError as error:
            raise error.within(row.where) from None
        return request

    def _uses(self, contender: Contender) -> tuple[AdapterUse, ...]:
        adapter = contender.adapter
        if adapter is None:
            return ()
        if adapter.digest not in self._adapters:
            self._adapters[adapter.digest] = adapter.to(self._device)
        return (as_use(AdapterChoice(adapter.digest, contender.strength), self._adapters),)

    def _answers(self, question: Question) -> list[Tokens]:
        """The tokens whose likelihood is wanted: the candidates', then the reference's."""
        row, wanted = question.row, question.wanted
        candidates = [self._encode(text) for text in row.candidates if wanted.choice]
        if all(tokens[-1] == self._tokenizer.eos_token_id for tokens in candidates):
            candidates = counted(candidates)
        found = [*candidates, *map(self._encode, row.references[: wanted.loss])]
        for tokens in found:
            try:
                check_length("completion", len(tokens), self._longest)
            except ReftError as error:
                raise error.within(row.where) from None
        return found

    def _encode(self, text: str) -> Tokens:
        return tuple(encode_answer(self._tokenizer, text))

    def _texts(
        self, asked: Sequence[Question], requests: Sequence[EncoderRequest]
    ) -> list[tuple[str, str]]:
        """Greedy answers, and why each ended; empty where none is wanted."""
        most = max(question.wanted.max_tokens * question.wanted.text for question in asked)
        if not most:
            return [("", "")] * len(asked)
        most = min(most, self._longest - 1)
        found = []
        for question, tokens in zip(asked, self._generator.generate(requests, most), strict=True):
            room = min(question.wanted.max_tokens, most)
            text = self._tokenizer.decode(tokens[:room], skip_special_tokens=True)
            assert isinstance(text, str)
            found.append((text, "length" if len(tokens) >= room else "stop"))
        return found


def _reply(
    question: Question,
    text: tuple[str, str],
    scores: list[float],
    answers: list[Tokens],
) -> Reply:
    wanted = question.wanted
    logprobs = tuple(scores[: len(question.row.candidates)]) if wanted.choice else ()
    loss, num_tokens = (-scores[-1], len(answers[-1])) if wanted.loss else (0.0, 0)
    return Reply(*(text if wanted.text else ("", "")), logprobs, loss, num_tokens)
