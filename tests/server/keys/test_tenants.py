"""What one tenant's keys see of another's: nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from server.app import create_app
from server.settings import Settings
from tests.server.conftest import ADMIN, ADMIN_KEY, Server
from tests.server.fakes import MODEL, make_adapter, make_tiny_loaded
from tests.server.keys.test_http import CHAT, forbidden, is_error, key_of, posts

PROMPT = "a prompt that is long enough for many blocks of the prefix cache, said once more " * 2


def put(server: Server, name: str, data: bytes, headers: dict[str, str], **params: str) -> Any:
    return server.http.post(f"/admin/adapters/{name}", content=data, headers=headers, params=params)


@pytest.fixture
def two(in_process) -> Iterator[Server]:
    """A shared adapter, one name that both tenants have, and one of each alone."""
    with in_process(require_keys=True, key_cache_s=0) as server:
        for tenant, names in (("", ("both", "shared")), ("acme", ("both", "a")), ("globex", "g")):
            for name in names:
                seed = sum(map(ord, tenant + name))
                answer = put(server, name, make_adapter(seed), ADMIN, tenant=tenant)
                assert answer.status_code == 201, answer.text
        yield server


def names(server: Server, headers: dict[str, str]) -> set[str]:
    cards = server.http.get("/v1/models", headers=headers).json()["data"]
    return {card["id"] for card in cards}


def digest(server: Server, model: str, headers: dict[str, str]) -> str:
    return server.http.get(f"/v1/models/{model}", headers=headers).json()["reft"]["digest"]


def test_lists_have_a_tenants_own_and_the_shared(two):
    assert names(two, key_of(two, tenant="acme")) == {MODEL.name, "both", "shared", "a"}
    assert names(two, key_of(two, tenant="globex")) == {MODEL.name, "both", "shared", "g"}
    assert names(two, key_of(two)) == {MODEL.name, "both", "shared"}


def test_a_name_means_the_tenants_own_first(two):
    mine, theirs = key_of(two, tenant="acme"), key_of(two, tenant="globex")
    assert digest(two, "both", mine) != digest(two, "both", theirs)
    assert digest(two, "both", theirs) == digest(two, "both", key_of(two))
    for headers in (mine, theirs):
        for answer in posts(two, headers, "both"):
            assert answer.status_code == 200
            assert answer.json()["reft"]["digest"] == digest(two, "both", headers)


def test_anothers_adapter_is_as_if_it_had_never_been(two):
    headers = key_of(two, tenant="globex", may_upload=True)
    uploaded = digest(two, "a", key_of(two, tenant="acme"))
    for form in ("{}", "{}@1", f"{{}}@sha256:{uploaded[:12]}"):
        texts = []
        for name in ("a", "never"):
            model = form.format(name)
            answers = posts(two, headers, model)
            reft = {"stack": [{"model": model}]}
            answers += posts(two, headers, "g", reft=reft)
            answers += posts(two, headers, MODEL.name, reft={"models": ["g", model]})[:2]
            answers.append(two.http.get(f"/v1/models/{model}", headers=headers))
            assert all(is_error(answer, 404, "model_not_found") for answer in answers)
            texts.append([answer.text.replace(f"'{model}'", "'NAME'") for answer in answers])
        assert texts[0] == texts[1], "the wording tells them apart"
        assert "'a'" not in "".join(texts[0])
        assert ", a," not in "".join(texts[0])
        assert "both" in texts[0][0], "names that it does see are there to help"


def test_with_its_own_key_the_same_adapter_is_there(two):
    """The control of the above."""
    headers = key_of(two, tenant="acme", may_upload=True)
    assert all(answer.status_code == 200 for answer in posts(two, headers, "a"))
    assert two.http.get("/admin/adapters/a", headers=headers).status_code == 200


def admin_answers(server: Server, headers: dict[str, str], name: str) -> list[Any]:
    """Everything that can be asked of one adapter by its name, changes last."""
    asks = [
        ("GET", ""),
        ("GET", "/file"),
        ("POST", "/versions/1/promote"),
        ("POST", "/rollback"),
        ("DELETE", "/versions/1"),
        ("DELETE", ""),
    ]
    return [
        server.http.request(method, f"/admin/adapters/{name}{path}", headers=headers)
        for method, path in asks
    ]


@pytest.mark.parametrize("fields", [{"may_upload": True}, {"kind": "admin"}])
def test_managing_reaches_a_tenants_own_names_alone(two, fields):
    headers = key_of(two, tenant="globex", **fields)
    foreign, never = (admin_answers(two, headers, name) for name in ("a", "never"))
    for one, other in zip(foreign, never, strict=True):
        assert is_error(one, 404, "model_not_found")
        assert one.text.replace("'a", "'NAME") == other.text.replace("'never", "'NAME")
    for tenant in ("acme", ""):
        answer = two.http.delete("/admin/adapters/both", headers=headers, params={"tenant": tenant})
        assert forbidden(answer)
        assert forbidden(put(two, "x", make_adapter(9), headers, tenant=tenant))
        assert forbidden(
            two.http.get("/admin/adapters", headers=headers, params={"tenant": tenant})
        )
    changes = admin_answers(two, headers, "shared")[2:]
    assert all(answer.status_code == 404 for answer in changes), "shared, and not its own"
    listed = two.http.get("/admin/adapters", headers=headers).json()["data"]
    assert [card["name"] for card in listed] == ["g"]
    assert put(two, "both", make_adapter(99), headers).status_code == 201
    assert two.http.delete("/admin/adapters/g", headers=headers).status_code == 200
    listed = two.http.get("/admin/adapters", headers=ADMIN).json()["data"]
    found = {(card["tenant"], card["name"]) for card in listed}
    assert found == {
        ("", "both"),
        ("", "shared"),
        ("acme", "both"),
        ("acme", "a"),
        ("globex", "both"),
    }


def test_a_user_key_that_may_not_upload_manages_nothing(two):
    headers = key_of(two, tenant="acme")
    for answer in (*admin_answers(two, headers, "a"), put(two, "a", make_adapter(3), headers)):
        assert is_error(answer, 401, "invalid_api_key")


def test_a_scope_holds_for_uploads_too(two):
    headers = key_of(two, tenant="acme", may_upload=True, models=("new-*",))
    assert forbidden(put(two, "other", make_adapter(3), headers))
    assert all(forbidden(answer) for answer in admin_answers(two, headers, "a"))
    assert put(two, "new-1", make_adapter(3), headers).status_code == 201


def test_pinning_takes_memory_from_all_and_so_an_operator(two):
    for fields in ({"may_upload": True}, {"kind": "admin"}):
        headers = key_of(two, tenant="acme", **fields)
        assert forbidden(two.http.put("/admin/adapters/a/pin", headers=headers))
    answer = two.http.put("/admin/adapters/a/pin", headers=ADMIN, params={"tenant": "acme"})
    assert answer.status_code == 200


def test_the_audit_log_says_which_key_and_shows_a_tenant_its_own(two):
    headers = key_of(two, "uploader", tenant="acme", may_upload=True)
    assert put(two, "new", make_adapter(5), headers).status_code == 201
    made = two.http.post("/admin/keys", json={"name": "n", "tenant": "acme"}, headers=ADMIN).json()
    two.http.delete(f"/admin/keys/{made['id']}", headers=ADMIN)
    two.http.delete(f"/admin/keys/{made['id']}", headers=ADMIN)
    admin = key_of(two, tenant="acme", kind="admin")
    mine = two.http.get("/admin/audit", headers=admin).json()["data"]
    assert {entry["tenant"] for entry in mine} == {"acme"}
    upload = next(entry for entry in mine if entry["name"] == "new")
    assert upload["actor"].startswith("uploader (")
    of_key = [entry for entry in mine if entry["name"] == made["id"]]
    assert [entry["action"] for entry in of_key] == ["revoke key", "create key"]
    everything = two.http.get("/admin/audit", headers=ADMIN).json()["data"]
    assert {entry["tenant"] for entry in everything} == {"", "acme", "globex"}
    user = key_of(two, tenant="acme", may_upload=True)
    assert is_error(two.http.get("/admin/audit", headers=user), 401, "invalid_api_key")


def test_the_engine_is_told_whose_every_request_is(two, engine):
    headers = key_of(two, tenant="acme")
    posts(two, headers, "both")
    posts(two, headers, MODEL.name, reft={"models": ["both", MODEL.name]})
    stream = CHAT | {"stream": True}
    two.http.post("/v1/chat/completions", json=stream, headers=headers)
    assert len(engine.submitted) > 6
    assert {request.tenant for request in engine.submitted} == {"acme"}
    engine.submitted.clear()
    posts(two, key_of(two), "both")
    assert {request.tenant for request in engine.submitted} == {""}


# With a model that runs ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Server]:
    """The embedded engine and a tiny model, where a name means something else to each tenant."""
    loaded = make_tiny_loaded()
    config = EngineConfig(max_model_len=512, max_prefill_tokens=64)
    folder = tmp_path_factory.mktemp("tenants")
    settings = Settings(data_dir=folder, admin_key=ADMIN_KEY, require_keys=True)
    base = loaded.description.to_base_spec()
    with TestClient(create_app(settings, EmbeddedEngine(loaded, config), loaded)) as client:
        server = Server(client.app.state.services, client)
        for seed, tenant in enumerate(("acme", "globex")):
            data = make_adapter(seed, base=base)
            assert put(server, "tone", data, ADMIN, tenant=tenant).status_code == 201
        yield server


def complete(server: Server, headers: dict[str, str], model: str) -> Any:
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "logprobs": 0}
    answer = server.http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_each_tenant_gets_its_own_adapter_of_the_same_name(tiny):
    answers = {}
    for tenant in ("acme", "globex"):
        answer = complete(tiny, key_of(tiny, tenant=tenant), "tone")
        expected = tiny.http.get(
            "/admin/adapters/tone", headers=ADMIN, params={"tenant": tenant}
        ).json()["versions"][0]["digest"]
        assert answer["reft"]["digest"] == expected
        answers[tenant] = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert answers["acme"] != answers["globex"]
    base = complete(tiny, key_of(tiny, tenant="acme"), "tiny")
    assert base["choices"][0]["logprobs"]["token_logprobs"] not in answers.values()


@pytest.mark.parametrize("model", ["tone", "tiny"])
def test_what_one_tenant_asked_is_never_in_the_cache_of_another(tiny, model):
    def cached(tenant: str) -> int:
        answer = complete(tiny, key_of(tiny, tenant=tenant), model)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    first, second = f"one-{model}", f"two-{model}"
    if model == "tone":  # the same bytes, and still nothing in common
        data = make_adapter(7, base=tiny.services.loaded.description.to_base_spec())
        for tenant in (first, second):
            assert put(tiny, "tone", data, ADMIN, tenant=tenant).status_code == 201
    assert cached(first) == 0
    assert cached(first) > 50, "the control: its own prompt is"
    assert cached(second) == 0
    assert cached(second) > 50


def test_classification_keeps_tenants_apart_too(tiny):
    def cached(headers: dict[str, str]) -> int:
        body = {"model": "tiny", "input": PROMPT, "labels": ["a", "b"]}
        answer = tiny.http.post("/v1/classify", content=json.dumps(body), headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    one, other = (
        key_of(tiny, tenant=tenant) | {"Content-Type": "application/json"}
        for tenant in ("classify-one", "classify-two")
    )
    assert cached(one) == 0
    assert cached(one) > 50
    assert cached(other) == 0


def test_the_same_bytes_tell_a_tenant_nothing_of_anothers_use(two):
    data = make_adapter(77)
    for tenant in ("acme", "globex"):
        assert put(two, "twin", data, ADMIN, tenant=tenant).status_code == 201
    for answer in posts(two, key_of(two, tenant="globex"), "twin"):
        assert answer.status_code == 200
    for fields in ({"kind": "admin"}, {"may_upload": True}):
        headers = key_of(two, tenant="acme", **fields)
        (card,) = two.http.get("/admin/adapters/twin", headers=headers).json()["versions"]
        listed = two.http.get("/admin/adapters", headers=headers).json()["data"]
        cards = [card, *listed, put(two, "twin", data, headers).json()]
        promote = "/admin/adapters/twin/versions/1/promote"
        cards.append(two.http.post(promote, headers=headers).json())
        assert {card["num_users"] for card in cards} == {None}
    detail = two.http.get("/admin/adapters/twin", headers=ADMIN, params={"tenant": "acme"}).json()
    assert detail["versions"][0]["num_users"] == 0
