"""An encoder served over HTTP: texts go to the trained heads of their adapters."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from reft_core.adapter import Adapter, decode_adapter
from reft_core.sites import ModelDescription, describe_model
from reft_core.spec import HeadSpec
from server.app import create_app
from server.settings import Settings
from tests.factories import random_adapter_bytes, random_classifier_bytes
from tests.reference.slow import reference_classify
from tests.reft_core.test_classification import encoder
from tests.reft_core.test_classifiers import word_tokenizer
from tests.server.conftest import ADMIN, Server
from tests.server.fakes import ended

TEXTS = ["a b c", "d e", "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-encoder"
    encoder("bert").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def served(make_settings, folder: Path) -> Iterator[Server]:
    settings: Settings = make_settings(
        model=str(folder), max_model_len=30, allow_inline_adapters=True
    )
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Server(app.state.services, client)


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelDescription:
    return describe_model(encoder("bert"), folder.name)


def classifier_bytes(model: ModelDescription, seed: int) -> bytes:
    head = HeadSpec(pooling="mean")
    return random_classifier_bytes(model, 2 + seed, head, seed=seed, positions="f2")


def expected(adapter: Adapter, text: str) -> list[float]:
    tokens = list(word_tokenizer()(text)["input_ids"])
    logits = reference_classify(encoder("bert"), tokens, [(adapter, 1.0)])
    return logits.log_softmax(-1).tolist()


def test_each_adapters_head_answers(served: Server, model: ModelDescription) -> None:
    for seed in range(3):
        data = classifier_bytes(model, seed)
        digest = served.upload(f"head-{seed}", data)["digest"]
        body = {"model": f"head-{seed}", "input": TEXTS}
        answer = served.http.post("/v1/classify", json=body)
        assert answer.status_code == 200, answer.text
        rows = answer.json()["data"]
        for text, row in zip(TEXTS, rows, strict=True):
            right = expected(decode_adapter(data), text)
            assert [label["logprob"] for label in row["labels"]] == pytest.approx(right, abs=1e-4)
            assert row["label"] == f"l{right.index(max(right))}"
            assert sum(row["probs"]) == pytest.approx(1)
        assert answer.json()["reft"]["digest"] == digest
        assert answer.json()["reft"]["num_edits"] == len(TEXTS) * 2 * 3
        usage = answer.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4 + 3 + 2, 0)
    metrics = served.http.get("/metrics").text
    assert re.search(r"^reft_prompt_tokens_total\{.*\} 27\.0$", metrics, re.MULTILINE)
    assert ended(metrics, "stop") == 9.0


def test_adapters_stack_and_are_scaled(served: Server, model: ModelDescription) -> None:
    served.upload("head", classifier_bytes(model, 1))
    served.upload("tone", random_adapter_bytes(model, method="steering", positions="prompt"))

    def logprobs(**body: object) -> list[float]:
        answer = served.http.post("/v1/classify", json={"model": "head", "input": "a b"} | body)
        assert answer.status_code == 200, answer.text
        return [label["logprob"] for label in answer.json()["data"][0]["labels"]]

    plain = logprobs()
    assert logprobs(reft={"stack": [{"model": "tone", "strength": 0}]}) == plain
    assert logprobs(reft={"stack": [{"model": "tone"}]}) != plain
    assert logprobs(reft={"strength": 0}) != plain
    chosen = logprobs(labels=["l2", "l0"])
    assert chosen == [plain[2], plain[0]]


def test_a_pair_may_be_graded_by_a_number(served: Server, model: ModelDescription) -> None:
    data = random_classifier_bytes(model, 1, HeadSpec(), positions="f2")
    served.upload("grade", data)
    body = {"model": "grade", "input": ["a b", "a"], "text_pair": ["c", "b c"]}
    answer = served.http.post("/v1/classify", json=body)
    assert answer.status_code == 200, answer.text
    tokens = [list(word_tokenizer()(*pair)["input_ids"]) for pair in (("a b", "c"), ("a", "b c"))]
    for row, read in zip(answer.json()["data"], tokens, strict=True):
        right = reference_classify(encoder("bert"), read, [(decode_adapter(data), 1.0)])
        assert row["value"] == pytest.approx(right.item(), abs=1e-4)
        assert (row["label"], row["labels"], row["num_classes"]) == (None, [], 0)
    one = served.http.post("/v1/classify", json=body | {"input": "a b", "text_pair": "c"})
    value = one.json()["data"][0]["value"]
    assert value == pytest.approx(answer.json()["data"][0]["value"], abs=1e-6)
    for change, message in [
        ({"text_pair": ["c"]}, "text_pair: got '1 texts', expected 2, one for each input"),
        ({"text_pair": 5}, "a string or a non-empty list of strings"),
        ({"labels": ["a", "b"]}, "the head says a number"),
    ]:
        refused = served.http.post("/v1/classify", json=body | change)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]


def test_what_an_encoder_cannot_do_is_said(served: Server, model: ModelDescription) -> None:
    served.upload("head", classifier_bytes(model, 0))
    served.upload("other", classifier_bytes(model, 1))
    served.upload("tone", random_adapter_bytes(model))
    for path, body in [
        ("/v1/completions", {"model": "head", "prompt": "a"}),
        ("/v1/completions", {"model": "head", "prompt": "a", "echo": True, "stream": True}),
        ("/v1/chat/completions", {"model": "head", "messages": [{"role": "user", "content": "a"}]}),
    ]:
        answer = served.http.post(path, json=body)
        assert answer.status_code == 400
        assert "is an encoder, which generates no text" in answer.json()["error"]["message"]
        assert "/v1/classify" in answer.json()["error"]["message"]
    twice = {"stack": [{"model": "other"}]}
    brought = {"inline": base64.b64encode(random_adapter_bytes(model)).decode()}
    for body, field, message in [
        ({"model": "tone"}, "model", "got 'tone', expected an adapter with a trained head"),
        ({"model": model.name}, "model", f"got '{model.name}', expected an adapter with"),
        ({"model": "head", "reft": twice}, "reft.stack", "one head among all adapters"),
        ({"model": model.name, "reft": brought}, "reft.inline", "an adapter with a trained head"),
        ({"model": "head", "labels": ["l0", "maybe"]}, "labels", "expected some of l0, l1"),
        ({"model": "head", "input": "a " * 40}, "input", "at most 30"),
    ]:
        answer = served.http.post("/v1/classify", json={"input": "a"} | body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"] == field, message in error["message"]) == (True, True), error


def test_models_and_admin_routes_work(served: Server, model: ModelDescription) -> None:
    served.upload("head", classifier_bytes(model, 0))
    cards = served.http.get("/v1/models").json()["data"]
    assert [(card["id"], card["max_model_len"]) for card in cards] == [
        (model.name, 30),
        ("head", 30),
    ]
    assert served.http.get("/readyz").status_code == 200
    assert served.http.get("/admin/adapters", headers=ADMIN).json()["data"][0]["name"] == "head"
    assert served.http.delete("/admin/adapters/head", headers=ADMIN).status_code == 200
    gone = served.http.post("/v1/classify", json={"model": "head", "input": "a"})
    assert gone.status_code == 404
