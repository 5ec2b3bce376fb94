from __future__ import annotations

import json

import pytest

from reft_core import errors as tree
from server.http.errors import ANSWERS, answer_for, error_body, error_response

ALL = [tree.ReftError]
for cls in ALL:
    ALL.extend(c for c in cls.__subclasses__() if c.__module__ == tree.__name__)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_has_an_answer_of_its_own(cls):
    assert cls in ANSWERS
    answer = answer_for(cls("what happened"))
    assert answer is ANSWERS[cls]
    assert 400 <= answer.status < 600
    assert (answer.type == "server_error") == (answer.status >= 500)


def test_a_subclass_from_elsewhere_is_answered_as_its_parent():
    class TooFancy(tree.UnsupportedFeature):
        pass

    assert answer_for(TooFancy("x")) is ANSWERS[tree.UnsupportedFeature]


def test_the_body_has_openais_shape():
    error = tree.InvalidRequest.because("n", 99, "at most 8")
    assert error_body(error) == {
        "error": {
            "message": "n: got 99, expected at most 8",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }
    }


def test_unexpected_errors_leak_nothing():
    response = error_response(RuntimeError("password=hunter2"))
    assert response.status_code == 500
    assert b"hunter2" not in response.body
    assert json.loads(response.body)["error"]["code"] == "internal_error"


def test_overload_says_when_to_come_back():
    response = error_response(tree.EngineOverloaded("full", retry_after_s=1.2))
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")
    assert error_response(tree.EngineUnavailable("going")).headers["retry-after"]


def test_lone_surrogates_do_not_break_the_answer():
    response = error_response(tree.InvalidRequest("bad \ud800 text", field="\udfff"))
    assert json.loads(response.body)["error"]["message"] == "bad \\ud800 text"
