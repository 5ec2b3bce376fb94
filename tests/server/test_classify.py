from __future__ import annotations

import pytest

from tests.server.fakes import MODEL


def classify(server, **body):
    return server.http.post("/v1/classify", json={"model": MODEL.name, "input": "hi"} | body)


def test_labels_must_come_from_somewhere(server):
    answer = classify(server)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "labels"
    assert "2 to 256 labels" in error["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"labels": ["a"]}, "labels"),
        ({"labels": ["a", "a"]}, "labels"),
        ({"labels": ["a", ""]}, "labels"),
        ({"input": []}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"label": ["a", "b"]}, "label"),
    ],
)
def test_bad_input_is_named(server, body, field):
    answer = classify(server, **({"labels": ["yes", "no"]} | body))
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]
