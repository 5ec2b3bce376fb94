"""Asks a server with OpenAI's API over HTTP, ours or another's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from reft_core.errors import InvalidRequest, ReftError
from reft_core.spec import TemplateSpec
from reft_core.templates import render_text
from server.client.address import api_url
from server.client.connection import document, in_words, options
from trainer.evaluation.asking.interface import Contender, Question, Reply

MAX_TRIES = 6
_BUSY = frozenset({408, 429, 502, 503, 504})
_LONGEST_PAUSE_S = 30.0


class UrlAsker:
    """Implements :class:`interface.Asker` over HTTP; a contender's name is the model asked for.

    Greedy answers come from ``/chat/completions``, where the server knows the template, or for
    contenders with one of their own from ``/completions``. Likelihoods come from our servers'
    ``/classify``, else from ``/completions`` with ``echo`` and ``logprobs``, which needs the
    prompt's text and so a template.
    """

    def __init__(self, http: httpx.Client, *, concurrency: int = 8) -> None:
        """``http`` asks what is below the API's address, and may be used by several threads."""
        self._http = http
        self._concurrency = concurrency
        self._has_classify: dict[str, bool] = {}

    @classmethod
    def at(
        cls, url: str, key: str | None, *, concurrency: int = 8, timeout_s: float = 600.0
    ) -> UrlAsker:
        """Asks the server at ``url``. Raises :class:`InvalidRequest` if it is no address."""
        limits = httpx.Limits(max_connections=concurrency)
        http = httpx.Client(**options(api_url(url), key, timeout_s), limits=limits)
        return cls(http, concurrency=concurrency)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """See :meth:`interface.Asker.ask`."""
        todo = iter(enumerate(questions))
        running: dict[Future[Reply], int] = {}
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                while True:
                    # Few are handed over at a time, so that an interruption waits for few.
                    while len(running) < self._concurrency and (new := next(todo, None)):
                        running[pool.submit(self._reply, new[1])] = new[0]
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
            finally:
                for future in running:
                    future.cancel()

    def _reply(self, question: Question) -> Reply:
        """Everything about one question."""
        wanted = question.wanted
        text, reason = self._answer(question) if wanted.text else ("", "")
        row = question.row
        try:
            logprobs = self._logprobs(question) if wanted.choice else ()
            loss, num_tokens = self._loss(question) if wanted.loss else (0.0, 0)
        except ReftError as error:
            raise error.within(row.where) from None
        return Reply(text, reason, logprobs, loss, num_tokens)

    def _answer(self, question: Question) -> tuple[str, str]:
        """A greedy answer and why it ended."""
        contender, wanted = question.contender, question.wanted
        body = {"model": contender.name, "max_tokens": wanted.max_tokens, "temperature": 0}
        if contender.template is None:
            found = self._post("/chat/completions", {**body, "messages": question.row.messages})
            choice = _first_choice(found)
            text = (choice.get("message") or {}).get("content") or ""
        else:
            prompt = render_text(contender.template, question.row.messages)
            choice = _first_choice(self._post("/completions", {**body, "prompt": prompt}))
            text = choice.get("text") or ""
        return str(text), str(choice.get("finish_reason") or "")

    def _logprobs(self, question: Question) -> tuple[float, ...]:
        """How likely each candidate is."""
        candidates = question.row.candidates
        if (found := self._classified(question)) is not None:
            return found
        return tuple(self._scored(question, candidate)[0] for candidate in candidates)

    def _loss(self, question: Question) -> tuple[float, int]:
        """Nats and tokens of the reference."""
        logprob, num_tokens = self._scored(question, question.row.references[0])
        return -logprob, num_tokens

    def _classified(self, question: Question) -> tuple[float, ...] | None:
        """By ``/classify``, which our servers have; None where there is none, or it does not
        fit: it takes one user message, and the server's template.
        """
        row, contender = question.row, question.contender
        fits = contender.template is None and len(row.turns) == 1 and len(row.candidates) > 1
        if not fits or self._has_classify.get(contender.name) is False:
            return None
        body = {"model": contender.name, "input": row.question, "labels": list(row.candidates)}
        response = self._send("/classify", body)
        self._has_classify[contender.name] = response.status_code not in (404, 405)
        if response.status_code in (404, 405):
            return None
        try:
            labels = document(response)["data"][0]["labels"]
            by_label = {each["label"]: float(each["logprob"]) for each in labels}
            return tuple(by_label[candidate] for candidate in row.candidates)
        except (KeyError, IndexError, TypeError, ValueError):
            raise ReftError("url: /classify answers in a form that is not ours") from None

    def _scored(self, question: Question, answer: str) -> tuple[float, int]:
        """The log-probability of ``answer`` behind the prompt, and of how many tokens.

        Without an end token: servers take text. Where one candidate begins another, the shorter is
        never the less likely then. A token that begins in the prompt and ends in
        the answer is the answer's.
        """
        contender, row = question.contender, question.row
        if not row.turns:
            return self._read(question)
        if contender.template is None:
            raise InvalidRequest.because(
                "template",
                "chat",
                "plain, or a --prompt, for likelihoods from this server: it has no /classify for "
                "these rows, and /completions needs the prompt as text",
            )
        prompt = render_text(contender.template, row.messages)
        found = self._echoed(contender, prompt + answer)
        if _edits(found):
            raise InvalidRequest.because(
                "template",
                "plain",
                f"auto: {contender.name!r} edits a prompt's tokens, and the answer is no part of "
                "the prompt; /classify knows where it begins",
            )
        return _of_answer(_logprobs_of(found), len(prompt), len(prompt + answer))

    def _read(self, question: Question) -> tuple[float, int]:
        """The log-probability of a text behind its first token, and of how many tokens."""
        contender, text = question.contender, question.row.references[0]
        found = self._echoed(contender, text)
        if _edits(found):
            expected = "a model that edits no prompt: here the whole text would be one"
            raise InvalidRequest.because("adapter", contender.name, expected)
        logprobs = _logprobs_of(found)
        offsets = logprobs.get("text_offset") or []
        return _of_answer(logprobs, offsets[1] if len(offsets) > 1 else 0, len(text))

    def _echoed(self, contender: Contender, text: str) -> dict[str, Any]:
        """What the server says of a prompt's own tokens."""
        body = {
            "model": contender.name,
            "prompt": text,
            "max_tokens": 1,  # some servers refuse 0
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        return self._post("/completions", body)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return document(self._send(path, body))

    def _send(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """A response, after trying again while the server is busy."""
        for number in range(1, MAX_TRIES + 1):
            with in_words(str(self._http.base_url)):
                response = self._http.post(path, json=body)
            if response.status_code not in _BUSY or number == MAX_TRIES:
                break
            time.sleep(_pause_s(response, number))
        return response


def remote_contender(
    url: str, name: str, template: TemplateSpec | None = None, *, digest: str = ""
) -> Contender:
    """A model of a server; what stands behind a name may change, unless its digest is known."""
    return Contender(name, f"{api_url(url)} {name} {digest}", template=template)


def _first_choice(found: Mapping[str, Any]) -> dict[str, Any]:
    choices = found.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ReftError("url: the server's answer has no choices")
    return choices[0]


def _edits(found: Mapping[str, Any]) -> bool:
    """Whether one of our servers edited the prompt."""
    return bool((found.get("reft") or {}).get("num_edits"))


def _logprobs_of(found: Mapping[str, Any]) -> dict[str, Any]:
    return _first_choice(found).get("logprobs") or {}


def _of_answer(logprobs: Mapping[str, Any], start: int, end: int) -> tuple[float, int]:
    """Sum and number of the log-probabilities of the tokens between two places of the text."""
    values, offsets = logprobs.get("token_logprobs"), logprobs.get("text_offset")
    tokens = logprobs.get("tokens")
    if not (isinstance(values, list) and isinstance(offsets, list) and isinstance(tokens, list)):
        raise ReftError(
            "url: the server does not give the prompt's log-probabilities (echo with logprobs); "
            "ask for metrics without likelihoods: no likelihood_*, loss or perplexity"
        )
    ends = [*offsets[1:], end]
    found = [
        value
        for value, offset, stop in zip(values, offsets, ends, strict=False)
        if stop > start and offset < end
    ]
    if not found or any(value is None for value in found):
        raise ReftError("url: the server's log-probabilities do not reach over the whole answer")
    return math.fsum(found), len(found)


def _pause_s(response: httpx.Response, number: int) -> float:
    """How long a busy server is left alone."""
    try:
        asked = float(response.headers.get("retry-after", ""))
    except ValueError:
        asked = 0.5 * 2**number
    return min(max(asked, 0.0), _LONGEST_PAUSE_S)
