"""``reft.inline``: adapters that requests bring along."""

from __future__ import annotations

import base64
import hashlib
import struct
import threading
from typing import Any

import pytest
from pydantic import ValidationError

from reft_core.adapter import decode_adapter
from reft_core.spec import TaskSpec
from tests.factories import random_adapter_bytes
from tests.reference.slow import reference_generate
from tests.server.conftest import ADMIN
from tests.server.fakes import BRACKETS, MODEL, make_adapter, make_tiny_model, wait_until
from tests.server.routes.test_chat import ask, prompt_text
from tests.server.routes.test_completions import events
from tests.server.routes.test_live import asking
from tests.server.routes.test_uploads import BAD

BASE = MODEL.name


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server(in_process):
    with in_process(allow_inline_adapters=True) as running:
        yield running


def send(server, path="/v1/completions", **body: Any):
    content = {"prompt": "hi", "max_tokens": 99} if path == "/v1/completions" else {}
    return server.http.post(path, json={"model": BASE} | content | body)


def assert_nothing_is_left(server, engine) -> None:
    residency = server.services.residency
    wait_until(lambda: residency.num_references == 0, "every adapter's release")
    assert engine.adapters == set()
    assert residency.num_bytes == 0
    assert server.http.get("/admin/adapters", headers=ADMIN).json()["data"] == []


def test_off_by_default(in_process, engine):
    with in_process() as server:
        answer = send(server, reft={"inline": encoded(make_adapter(1))})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "reft.inline")
    assert "characters of base64" in error["message"]
    assert not engine.submitted
    assert not engine.loads


def test_a_completion(server, engine):
    data = make_adapter(1)
    answer = send(server, reft={"inline": encoded(data), "strength": 0.5})
    assert answer.status_code == 200, answer.text
    digest = digest_of(data)
    assert answer.json()["choices"][0]["text"] == f"I am {digest[:6]}."
    assert answer.json()["model"] == BASE
    assert answer.json()["reft"] == {
        "adapter": f"inline@sha256:{digest[:12]}",
        "version": None,
        "digest": digest,
        "stack": [],
        "num_edits": 4,
    }
    assert answer.headers["x-reft-adapter"] == digest
    assert answer.headers["x-reft-edits"] == "4"
    assert engine.submitted[0].adapters[0].strength == 0.5
    assert_nothing_is_left(server, engine)
    assert engine.unloads == [digest]
    assert send(server, model=answer.json()["reft"]["adapter"]).status_code == 404


def test_a_stream_says_it_in_its_first_chunk(server, engine):
    data = make_adapter(1)
    chunks = events(send(server, reft={"inline": encoded(data)}, stream=True))
    assert chunks[0]["reft"]["digest"] == digest_of(data)
    assert_nothing_is_left(server, engine)


def test_chat_has_its_template(server, engine, loaded):
    data = make_adapter(1, template=BRACKETS)
    answer = ask(server, reft={"inline": encoded(data)})
    assert answer.json()["reft"]["digest"] == digest_of(data)
    assert prompt_text(engine, loaded) == "U[hello]"
    assert_nothing_is_left(server, engine)


def test_classify_has_its_labels(server, engine):
    data = make_adapter(1, task=TaskSpec(labels=("no", "yes")))
    answer = send(server, "/v1/classify", input="hi", reft={"inline": encoded(data)})
    assert answer.status_code == 200, answer.text
    assert [label["label"] for label in answer.json()["data"][0]["labels"]] == ["no", "yes"]
    assert answer.json()["reft"]["digest"] == digest_of(data)
    assert_nothing_is_left(server, engine)


def test_stacked(server, engine):
    first, second = make_adapter(1), make_adapter(2)
    stack = [{"model": BASE, "inline": encoded(second)}]
    alone = send(server, reft={"stack": stack}).json()["reft"]
    assert alone["adapter"] is None
    assert [used["digest"] for used in alone["stack"]] == [digest_of(second)]
    assert [used["version"] for used in alone["stack"]] == [None]
    both = send(server, reft={"inline": encoded(first), "stack": stack}).json()["reft"]
    assert both["digest"] == digest_of(first)
    assert [choice.digest for choice in engine.submitted[-1].adapters] == [
        digest_of(first),
        digest_of(second),
    ]
    assert_nothing_is_left(server, engine)


def test_beside_others_in_a_fan_out(server, engine):
    kept, brought = make_adapter(1), make_adapter(2)
    server.upload("tone", kept)
    models = ["tone", {"model": BASE, "inline": encoded(brought)}, BASE]
    answer = send(server, reft={"models": models}).json()
    assert [choice["reft"]["digest"] for choice in answer["choices"]] == [
        digest_of(kept),
        digest_of(brought),
        None,
    ]
    assert engine.adapters == {digest_of(kept)}


@pytest.mark.parametrize(
    ("body", "param", "status", "code"),
    [
        ({"inline": "no base64!"}, "reft.inline", 400, "adapter_file_invalid"),
        ({"inline": "né"}, "reft.inline", 400, "adapter_file_invalid"),
        ({"inline": "abc"}, "reft.inline", 400, "adapter_file_invalid"),
        ({"inline": ""}, "reft.inline", 400, "adapter_file_invalid"),
        ({"inline": "A" * 8000}, "reft.inline", 413, "adapter_too_large"),
        ({"inline": 5}, "reft.inline", 400, "invalid_value"),
        (
            {"stack": [{"model": BASE, "inline": "AAAA"}]},
            "reft.stack[0].inline",
            400,
            "adapter_file_invalid",
        ),
        (
            {"models": [BASE, {"model": BASE, "inline": "AAAA"}]},
            "reft.models[1]",
            400,
            "adapter_file_invalid",
        ),
        ({"inline": "AAAA", "models": [BASE]}, "reft.inline", 400, "invalid_value"),
    ],
)
def test_errors_name_the_field(in_process, engine, body, param, status, code):
    with in_process(allow_inline_adapters=True, max_inline_adapter_bytes=4096) as server:
        answer = send(server, reft=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
        assert len(error["message"]) < 400
        assert_nothing_is_left(server, engine)


@pytest.mark.parametrize("case", BAD)
def test_hostile_files_are_refused(server, engine, case):
    data = BAD[case][0]
    answer = send(server, reft={"inline": encoded(data)})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["param"] == "reft.inline"
    assert not engine.submitted
    assert_nothing_is_left(server, engine)


def test_the_cap_counts_bytes_of_the_file(in_process, engine):
    data = make_adapter(1)
    with in_process(allow_inline_adapters=True, max_inline_adapter_bytes=len(data)) as server:
        assert send(server, reft={"inline": encoded(data)}).status_code == 200
    assert digest_of(data) in engine.unloads


def test_one_byte_over_the_cap(in_process, engine):
    data = make_adapter(1)
    with in_process(allow_inline_adapters=True, max_inline_adapter_bytes=len(data) - 1) as server:
        answer = send(server, reft={"inline": encoded(data)})
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, "reft.inline")
        header_alone = struct.pack("<Q", 2**40) + b"{}"
        assert send(server, reft={"inline": encoded(header_alone)}).status_code == 400


def test_it_goes_only_with_the_base_model(server):
    server.upload("tone", make_adapter(1))
    answer = send(server, model="tone", reft={"inline": encoded(make_adapter(2))})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
    stack = [{"model": "tone", "inline": encoded(make_adapter(2))}]
    answer = send(server, reft={"stack": stack})
    assert answer.json()["error"]["param"] == "reft.stack[0].model"
    assert send(server, model="nope", reft={"inline": "AAAA"}).status_code == 404


def test_the_same_bytes_as_a_registered_adapter(server, engine):
    """It is one resident adapter, which stays as long as its name is in use or remembered."""
    data = make_adapter(1)
    server.upload("tone", data)
    send(server, model="tone")
    assert send(server, reft={"inline": encoded(data)}).status_code == 200
    assert engine.loads == [digest_of(data)]
    assert engine.adapters == {digest_of(data)}


def test_a_name_asked_for_meanwhile_keeps_it(server, engine):
    data = make_adapter(1)
    server.upload("tone", data)
    engine.pause()
    answers: list[Any] = []
    bodies = [{"reft": {"inline": encoded(data)}}, {"model": "tone"}]
    threads = []
    for number, body in enumerate(bodies, start=1):
        thread = threading.Thread(target=lambda body=body: answers.append(send(server, **body)))
        thread.start()
        threads.append(thread)
        wait_until(lambda number=number: engine.num_open == number, "the request's submission")
    engine.resume()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert engine.adapters == {digest_of(data)}
    assert engine.unloads == []


def test_it_counts_in_the_budget_and_leaves_with_its_last_user(server, engine):
    data = make_adapter(1)
    engine.pause()
    answers: list[Any] = []
    body = {"reft": {"inline": encoded(data)}}
    threads = [
        threading.Thread(target=lambda: answers.append(send(server, **body))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: engine.num_open == 3, "all requests' submission")
    assert server.services.residency.num_users(digest_of(data)) == 3
    assert server.services.residency.num_bytes == len(data)
    assert engine.loads == [digest_of(data)]
    engine.resume()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert_nothing_is_left(server, engine)


def test_a_client_that_leaves_takes_its_adapter_along(on_socket, engine):
    data = make_adapter(1)
    with on_socket(allow_inline_adapters=True) as server:
        engine.pause()
        with asking(server, reft={"inline": encoded(data)}):
            wait_until(lambda: engine.num_open == 1, "the request to reach the engine")
        wait_until(lambda: engine.adapters == set(), "the adapter to leave")
        assert server.services.residency.num_bytes == 0


def test_an_engine_that_refuses_it_leaves_nothing(server, engine):
    from reft_core.errors import AdapterMismatch

    engine.load_failure = AdapterMismatch("method: got 'x', expected another", field="method")
    answer = send(server, reft={"inline": encoded(make_adapter(1))})
    assert answer.status_code == 400
    assert_nothing_is_left(server, engine)


def test_an_adapter_for_another_model_is_refused(server, engine):
    from reft_core.sites import describe_model

    foreign = random_adapter_bytes(describe_model(make_tiny_model(), "other"))
    answer = send(server, reft={"inline": encoded(foreign)})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "adapter_mismatch")
    assert error["param"] == "reft.inline"
    assert_nothing_is_left(server, engine)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, False),
        ({"max_inline_adapter_bytes": 1572864}, True),
        ({"max_inline_adapter_bytes": 1572864, "max_body_bytes": 4 * 1024 * 1024}, False),
        ({"max_adapter_bytes": 65536}, True),
    ],
)
def test_the_limits_agree(make_settings, changes, refused):
    make_settings(**changes)  # of no matter while they are off
    if not refused:
        make_settings(allow_inline_adapters=True, **changes)
        return
    with pytest.raises(ValidationError, match="max_inline_adapter_bytes: got"):
        make_settings(allow_inline_adapters=True, **changes)


def test_answers_are_those_of_the_adapter(tiny, monkeypatch):
    """The embedded engine against the slow truth, and what is left of it afterwards."""
    services = tiny.services
    for user in (services.text_generator, services.labeller):
        reader = user._inline
        monkeypatch.setattr(user, "_inline", type(reader)(reader.model, 2**20))
    data = random_adapter_bytes(services.engine.model, seed=3)
    prompt = list(b"which way to go")
    body = {
        "model": services.engine.model.name,
        "prompt": prompt,
        "max_tokens": 6,
        "temperature": 0,
        "reft": {"inline": encoded(data)},
    }
    answer = tiny.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    expected = reference_generate(make_tiny_model(), prompt, 6, decode_adapter(data))
    vocabulary = services.loaded.tokenizer
    assert answer.json()["choices"][0]["text"] == vocabulary.decode(expected)
    assert answer.json()["reft"]["num_edits"] > 0
    wait_until(lambda: not services.engine.has_adapter(digest_of(data)), "the adapter to leave")
