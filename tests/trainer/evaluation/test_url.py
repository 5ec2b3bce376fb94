"""Servers over HTTP: a fake of somebody else's, and ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from reft_core.errors import ReftError
from reft_core.spec import TemplateSpec
from trainer.evaluation.asking import Contender, Question, Reply, Wanted
from trainer.evaluation.asking import url as url_module
from trainer.evaluation.asking.url import UrlAsker
from trainer.evaluation.rows import Row

TEMPLATE = TemplateSpec(user="Q: {content}\n", generation="A:")
ROW = Row("1", "f:1", (("user", "how?"),), (" so",), "so", ("so", "not"), (" so", " not"))
Answer = Callable[[str, dict[str, Any]], httpx.Response]


def words(text: str) -> list[str]:
    """A token is a word with the space before it."""
    return [f"{' ' * (n > 0)}{word}" for n, word in enumerate(text.split(" "))]


def foreign(path: str, body: dict[str, Any]) -> httpx.Response:
    """A server with chat and completions; a token's log-probability is minus its length."""
    if path == "/v1/chat/completions":
        message = {"content": f"you said {body['messages'][-1]['content']}"}
        return httpx.Response(
            200, json={"choices": [{"message": message, "finish_reason": "stop"}]}
        )
    if path != "/v1/completions":
        return httpx.Response(404, json={"error": {"message": "no such route"}})
    if not body.get("echo"):
        choice = {"text": f" after {body['prompt']!r}", "finish_reason": "length"}
        return httpx.Response(200, json={"choices": [choice]})
    tokens = [*words(body["prompt"]), " more"]
    offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
    values = [None, *(-float(len(token)) for token in tokens[1:])]
    logprobs = {"tokens": tokens, "token_logprobs": values, "text_offset": offsets}
    return httpx.Response(200, json={"choices": [{"text": "", "logprobs": logprobs}]})


def ask(answer: Answer, *questions: Question, concurrency: int = 2) -> list[Reply]:
    def handle(request: httpx.Request) -> httpx.Response:
        return answer(request.url.path, json.loads(request.content))

    http = httpx.Client(transport=httpx.MockTransport(handle), base_url="http://there/v1")
    with http:
        found = dict(UrlAsker(http, concurrency=concurrency).ask(questions))
    return [found[place] for place in range(len(questions))]


def question(row: Row = ROW, template: TemplateSpec | None = TEMPLATE, **wanted: bool) -> Question:
    fields = {"text": False, "choice": False, "loss": False} | wanted
    return Question(Contender("m", "there m", template=template), row, Wanted(**fields))


def test_answers_come_by_chat_or_behind_a_template() -> None:
    chat, plain = ask(foreign, question(template=None, text=True), question(text=True))
    assert (chat.text, chat.finish_reason) == ("you said how?", "stop")
    assert (plain.text, plain.finish_reason) == (" after 'Q: how?\\nA:'", "length")


def test_likelihoods_are_those_of_the_answers_tokens_alone() -> None:
    (found,) = ask(foreign, question(choice=True, loss=True))
    assert found.logprobs == (-3.0, -4.0)  # " so", " not"
    assert (found.loss, found.num_tokens) == (3.0, 1)


def test_a_text_alone_is_scored_behind_its_first_token() -> None:
    row = Row("1", "f:1", (), ("one three five",), texts=("one three five",))
    (found,) = ask(foreign, question(row, None, loss=True))
    assert (found.loss, found.num_tokens) == (6.0 + 5.0, 2)  # " three", " five"

    def edits(path: str, body: dict[str, Any]) -> httpx.Response:
        answer = foreign(path, body).json()
        return httpx.Response(200, json=answer | {"reft": {"num_edits": 3}})

    with pytest.raises(ReftError, match=r"f:1: adapter: got 'm'.*edits no prompt"):
        ask(edits, question(row, None, loss=True))


def test_many_are_asked_at_a_time_and_come_back_to_their_places() -> None:
    running, most = set[int](), [0]
    both = threading.Barrier(2, timeout=20)

    def slow(path: str, body: dict[str, Any]) -> httpx.Response:
        running.add(threading.get_ident())
        both.wait()  # returns only when two are here at once
        most[0] = max(most[0], len(running))
        return foreign(path, body)

    rows = [Row(str(n), f"f:{n}", (("user", f"q{n}"),), ("a",)) for n in range(6)]
    found = ask(slow, *(question(row, None, text=True) for row in rows))
    assert [reply.text for reply in found] == [f"you said q{n}" for n in range(6)]
    assert most[0] == 2


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(url_module.time, "sleep", pauses.append)
    answers = [
        httpx.Response(429, json={"error": {"message": "busy"}}, headers={"retry-after": "3"}),
        httpx.Response(503, json={"error": {"message": "busy"}}),
    ]

    def busy(path: str, body: dict[str, Any]) -> httpx.Response:
        return answers.pop(0) if answers else foreign(path, body)

    (found,) = ask(busy, question(template=None, text=True))
    assert found.text == "you said how?"
    assert pauses == [3.0, 2.0]


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "does not give the prompt's log-probabilities"),
        ({"tokens": ["Q:"], "token_logprobs": [None], "text_offset": [0]}, "whole answer"),
    ],
)
def test_a_server_without_likelihoods_is_refused_clearly(
    logprobs: dict[str, Any] | None, message: str
) -> None:
    def mute(path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(200, json={"choices": [{"text": "", "logprobs": logprobs}]})

    with pytest.raises(ReftError, match=f"f:1: .*{message}"):
        ask(mute, question(loss=True))


def test_without_a_template_another_server_tells_no_likelihoods() -> None:
    with pytest.raises(ReftError, match="f:1: template: got 'chat'"):
        ask(foreign, question(template=None, choice=True))


def ours(path: str, body: dict[str, Any]) -> httpx.Response:
    """What our own server answers to what is asked of it here."""
    if path == "/v1/classify":
        labels = [{"label": label, "logprob": -len(label)} for label in body["labels"]]
        return httpx.Response(200, json={"data": [{"labels": labels[::-1]}]})
    found = foreign(path, body).json()
    return httpx.Response(200, json=found | {"reft": {"num_edits": 3}})


def test_our_server_says_where_an_answer_begins() -> None:
    (found,) = ask(ours, question(template=None, choice=True))
    assert found.logprobs == (-3.0, -4.0)
    with pytest.raises(ReftError, match="'m' edits a prompt's tokens"):
        ask(ours, question(loss=True))


def test_a_refusal_is_the_servers_own_words() -> None:
    def refuse(path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(404, json={"error": {"message": "no model 'm'"}})

    with pytest.raises(ReftError, match="no model 'm'"):
        ask(refuse, question(template=None, text=True))
