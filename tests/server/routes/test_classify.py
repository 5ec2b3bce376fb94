from __future__ import annotations

import math

import pytest

from reft_core.errors import RequestFailed
from reft_core.spec import TaskSpec
from tests.server.conftest import ADMIN
from tests.server.fakes import BRACKETS, MODEL, ended, make_adapter, wait_until
from tests.server.routes.test_live import asking


def classify(server, **body):
    return server.http.post("/v1/classify", json={"model": MODEL.name, "input": "hi"} | body)


def test_labels_must_come_from_somewhere(server):
    answer = classify(server)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "labels"
    assert "2 to 256 labels" in error["message"]


def test_more_labels_than_the_engine_takes_in_are_refused(in_process, engine):
    with in_process(max_num_seqs=2, max_waiting=2) as server:
        assert classify(server, input=["hi", "ho"], labels=["a", "b"]).status_code == 200
        num_submitted = len(engine.submitted)
        refused = classify(server, input=["hi", "ho"], labels=["a", "b", "c"])
        too_many_texts = classify(server, input=["hi"] * 5, labels=["a", "b"])
    assert refused.json()["error"]["param"] == "input"
    assert "2 texts x 3 labels = 6', expected at most 4" in refused.json()["error"]["message"]
    assert "expected at most 4" in too_many_texts.json()["error"]["message"]
    assert len(engine.submitted) == num_submitted


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


def test_an_answer_says_how_likely_each_label_is(server):
    """The fake engine gives every token a log-probability of -0.5."""
    answer = classify(server, input=["hi", "you there"], labels=["no", "yes"])
    assert answer.status_code == 200
    body = answer.json()
    assert [row["label"] for row in body["data"]] == ["no", "no"]
    row = body["data"][1]
    assert (row["index"], row["num_classes"]) == (1, 2)
    assert [label["logprob"] for label in row["labels"]] == [-1.0, -1.5]
    odds = math.exp(-0.5)
    assert row["probs"] == pytest.approx([1 / (1 + odds), odds / (1 + odds)])
    assert [label["prob"] for label in row["labels"]] == row["probs"]
    assert body["reft"] == {
        "adapter": None,
        "version": None,
        "digest": None,
        "stack": [],
        "num_edits": 0,
    }
    assert answer.headers["x-reft-adapter"] == "base"
    usage = body["usage"]
    assert usage["completion_tokens"] == 2 * (2 + 3)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_an_adapter_brings_its_labels_and_its_template(server, engine):
    data = make_adapter(1, template=BRACKETS, task=TaskSpec(labels=("a", "bc", "def")))
    digest = server.upload("tone", data)["digest"]
    answer = classify(server, model="tone", reft={"strength": 0.5})
    assert [label["label"] for label in answer.json()["data"][0]["labels"]] == ["a", "bc", "def"]
    assert answer.json()["reft"]["digest"] == digest
    assert answer.json()["reft"]["num_edits"] == 3 * 4  # two positions in two layers, by label
    prompts = {
        server.services.loaded.tokenizer.decode(request.prompt) for request in engine.submitted
    }
    assert prompts == {"U[hi]"}
    assert {request.adapters[0].strength for request in engine.submitted} == {0.5}
    assert server.services.residency.num_users(digest) == 0

    stacked = classify(server, labels=["a", "b"], reft={"stack": [{"model": "tone"}]})
    assert stacked.json()["reft"]["adapter"] is None
    assert [used["digest"] for used in stacked.json()["reft"]["stack"]] == [digest]
    assert "U[hi]" not in server.services.loaded.tokenizer.decode(engine.submitted[-1].prompt)


def test_an_adapters_labels_are_shown_without_the_space_they_begin_with(server, engine):
    server.upload("kinds", make_adapter(1, task=TaskSpec(labels=(" one", " two"))))

    def asked(**body):
        answer = classify(server, model="kinds", **body).json()["data"][0]
        return answer["label"], [each["label"] for each in answer["labels"]]

    decode = server.services.loaded.tokenizer.decode
    assert asked() == ("one", ["one", "two"])
    assert asked(labels=["two", "one"]) == ("two", ["two", "one"])
    assert asked(labels=[" one", " two"]) == (" one", [" one", " two"])
    scored = [decode(request.completion) for request in engine.submitted]
    assert scored == [" one", " two", " two", " one", " one", " two"]
    assert asked(labels=["three", "one"])[1] == ["three", "one"]
    assert decode(engine.submitted[-2].completion) == "three", "not one of the adapter's"


def test_one_label_that_fails_fails_the_request(server, engine):
    digest = server.upload("tone", make_adapter(1))["digest"]
    engine.fail_after, engine.failure = 2, RequestFailed("broken")
    answer = classify(server, model="tone", labels=["no", "yes"])
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "broken"
    wait_until(lambda: engine.num_open == 0, "the other label to end")
    assert server.services.residency.num_users(digest) == 0
    metrics = server.http.get("/metrics").text
    assert ended(metrics, "error") == 1.0


def test_a_text_that_is_refused_takes_the_others_along(server, engine):
    answer = classify(server, input=["hi", "x" * 300], labels=["no", "yes"])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    wait_until(lambda: engine.num_open == 0, "the first text to be dropped")


def test_a_client_that_leaves_drops_its_texts(live, engine):
    digest = live.upload("tone", make_adapter(1))["digest"]
    engine.pause()
    body = {"model": "tone", "input": ["hi", "ho"], "labels": ["no", "yes"]}
    with asking(live, path="/v1/classify", body=body):
        wait_until(lambda: engine.num_open == 4, "the labels to reach the engine")
    wait_until(lambda: engine.num_open == 0, "the labels to be cancelled")
    wait_until(lambda: live.services.residency.num_users(digest) == 0, "the adapter's release")
    metrics = live.http.get("/metrics", headers=ADMIN).text
    assert ended(metrics, "abort") == 2.0
