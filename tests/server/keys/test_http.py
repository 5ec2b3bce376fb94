"""What keys mean over HTTP: every route's door, scopes, rates, and the routes that manage keys."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from reft_core.errors import DatabaseUnavailable
from server.keys import NewKey, secret
from tests.server.conftest import ADMIN, ADMIN_KEY, API_KEY, Server
from tests.server.fakes import MODEL, make_adapter, wait_until

ASK = {"model": MODEL.name, "prompt": "hi", "max_tokens": 2}
CHAT = {"model": MODEL.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
CLASSIFY = {"model": MODEL.name, "input": "hi", "labels": ["a", "b"]}
OPEN = {("GET", "/healthz"), ("GET", "/readyz")}


def is_error(answer, status: int, code: str) -> bool:
    error = answer.json()["error"]
    return (
        answer.status_code == status
        and set(error) == {"message", "type", "param", "code"}
        and error["code"] == code
    )


def forbidden(answer) -> bool:
    return (
        is_error(answer, 403, "insufficient_permissions")
        and answer.json()["error"]["type"] == "insufficient_permissions"
    )


def key_of(server: Server, name: str = "bot", **fields: Any) -> dict[str, str]:
    """Headers with a new key."""
    text, _ = server.services.key_store.create(NewKey(name=name, **fields))
    return {"Authorization": f"Bearer {text}"}


@pytest.fixture
def closed(in_process) -> Iterator[Server]:
    """A server that needs keys and whose door remembers nothing."""
    with in_process(require_keys=True, key_cache_s=0) as running:
        yield running


def routes_of(app) -> list[APIRoute]:
    """Every route, whichever router it is in."""
    found, waiting = [], list(app.routes)
    while waiting:
        route = waiting.pop()
        inner = getattr(route, "original_router", None)
        waiting += inner.routes if inner is not None else ()
        if inner is None:
            found.append(route)
    return found


def doors(server: Server) -> Iterator[tuple[str, str]]:
    """A method and a path for every route of the app."""
    for route in routes_of(server.http.app):
        assert isinstance(route, APIRoute), f"{route} has no door"
        path = route.path.replace(":path", "")
        for name in route.param_convertors:
            path = path.replace(f"{{{name}}}", "1")
        assert "{" not in path
        for method in route.methods:
            yield method, path


def test_every_route_needs_a_key_but_those_that_say_whether_the_server_lives(closed):
    found = set(doors(closed))
    paths = closed.http.app.openapi()["paths"]
    assert len(found) >= sum(len(methods) for methods in paths.values()) > 10
    answers = {
        door: closed.http.request(*door, headers=headers).status_code
        for door in found
        for headers in ({}, {"Authorization": "Bearer wrong"})
    }
    assert {door for door, status in answers.items() if status != 401} == OPEN
    assert {answers[door] for door in OPEN} == {200}


def test_metrics_are_open_where_the_settings_say_so(in_process):
    with in_process(require_keys=True, metrics_public=True) as server:
        answers = {door: server.http.request(*door).status_code for door in doors(server)}
    assert {door for door, status in answers.items() if status != 401} == {
        *OPEN,
        ("GET", "/metrics"),
    }


def test_with_a_key_the_same_routes_are_open(closed):
    """The control of the walk: what answers 401 there is there."""
    user, admin = key_of(closed), key_of(closed, kind="admin")
    for path in ("/v1/models", "/docs", "/redoc", "/openapi.json"):
        assert closed.http.get(path, headers=user).status_code == 200
    for path in ("/admin/adapters", "/admin/keys", "/metrics", "/docs"):
        assert closed.http.get(path, headers=admin).status_code == 200
    for path, body in (("completions", ASK), ("chat/completions", CHAT), ("classify", CLASSIFY)):
        answer = closed.http.post(f"/v1/{path}", json=body, headers=user)
        assert answer.status_code == 200, answer.text


def test_documents_are_open_where_the_api_is(server):
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert server.http.get(path).status_code == 200


# Scopes -------------------------------------------------------------------------------------


@pytest.fixture
def two_adapters(closed) -> Server:
    closed.upload("support-nice", make_adapter(1))
    closed.upload("sales", make_adapter(2))
    return closed


def posts(server: Server, headers: dict[str, str], model: str, **more: Any) -> list[Any]:
    """The answers of every route that a model answers."""
    return [
        server.http.post(f"/v1/{path}", json=body | {"model": model} | more, headers=headers)
        for path, body in (("completions", ASK), ("chat/completions", CHAT), ("classify", CLASSIFY))
    ]


@pytest.mark.parametrize(
    ("models", "allowed"),
    [
        (("*",), {MODEL.name, "support-nice", "sales"}),
        (("support-*",), {"support-nice"}),
        (("sales", MODEL.name), {"sales", MODEL.name}),
        (("SALES", "sale", "ales"), set()),
    ],
)
def test_a_scope_decides_which_models_answer(two_adapters, models, allowed):
    headers = key_of(two_adapters, models=models)
    listed = two_adapters.http.get("/v1/models", headers=headers).json()["data"]
    assert {card["id"] for card in listed} == allowed
    for model in (MODEL.name, "support-nice", "sales"):
        for answer in posts(two_adapters, headers, model):
            assert answer.status_code == 200 if model in allowed else forbidden(answer)
        card = two_adapters.http.get(f"/v1/models/{model}", headers=headers)
        assert card.status_code == 200 if model in allowed else forbidden(card)


def test_a_scope_holds_for_every_form_of_a_name(two_adapters):
    headers = key_of(two_adapters, models=("support-*",))
    digest = two_adapters.http.get("/admin/adapters/sales", headers=ADMIN).json()["versions"][0]
    for model in ("sales@1", f"sales@sha256:{digest['digest'][:12]}"):
        for answer in posts(two_adapters, headers, model):
            assert forbidden(answer)
    assert all(a.status_code == 200 for a in posts(two_adapters, headers, "support-nice@1"))


def test_a_scope_holds_for_stacks_and_fan_outs(two_adapters):
    headers = key_of(two_adapters, models=("support-*", MODEL.name))
    stack = {"stack": [{"model": "sales"}]}
    for answer in posts(two_adapters, headers, "support-nice", reft=stack):
        assert forbidden(answer)
    fan_out = {"models": ["support-nice", "sales"]}
    for answer in posts(two_adapters, headers, MODEL.name, reft=fan_out)[:2]:
        assert forbidden(answer)
        assert answer.json()["error"]["param"] == "reft.models[1]"
    for reft in ({"stack": [{"model": "support-nice"}]}, {"models": ["support-nice", MODEL.name]}):
        for answer in posts(two_adapters, headers, MODEL.name, reft=reft)[:2]:
            assert answer.status_code == 200, answer.text


def test_pages_of_models_are_full_though_some_are_hidden(two_adapters):
    for name in ("a", "support-b", "c", "support-d", "support-e"):
        two_adapters.upload(name, make_adapter(1))
    headers = key_of(two_adapters, models=("support-*",))
    seen, after = [], ""
    while page := two_adapters.http.get(
        "/v1/models", params={"after": after, "limit": 2}, headers=headers
    ).json()["data"]:
        assert len(page) <= 2
        seen += [card["id"] for card in page]
        after = seen[-1]
    assert seen == ["support-b", "support-d", "support-e", "support-nice"]


def test_a_model_that_is_not_there_is_not_found_whatever_the_scope(two_adapters):
    for models in (("*",), ("support-*",)):
        for answer in posts(two_adapters, key_of(two_adapters, models=models), "nobody"):
            assert is_error(answer, 404, "model_not_found")


# Rates --------------------------------------------------------------------------------------


def test_requests_over_the_rate_are_429s_and_others_go_on(closed):
    slow, other = key_of(closed, requests_per_minute=2), key_of(closed)
    first = closed.http.post("/v1/completions", json=ASK, headers=slow)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert closed.http.get("/v1/models", headers=slow).status_code == 200
    over = closed.http.post("/v1/completions", json=ASK, headers=slow)
    assert is_error(over, 429, "rate_limit_exceeded")
    assert 1 <= int(over.headers["retry-after"]) <= 30
    assert over.headers["x-ratelimit-remaining-requests"] == "0"
    assert closed.http.post("/v1/completions", json=ASK, headers=other).status_code == 200


def test_defaults_of_the_settings_hold_for_keys_that_say_nothing_else(in_process):
    with in_process(api_key=API_KEY, key_requests_per_minute=1) as server:
        static, own = {"Authorization": f"Bearer {API_KEY}"}, key_of(server, requests_per_minute=0)
        for headers, statuses in ((static, [200, 429]), (own, [200, 200])):
            found = [server.http.get("/v1/models", headers=headers) for _ in range(2)]
            assert [answer.status_code for answer in found] == statuses


def test_prompt_tokens_are_charged_before_and_answers_as_they_come(closed, engine):
    headers = key_of(closed, tokens_per_minute=60)
    engine.reply = lambda _: "x" * 300
    ask = ASK | {"prompt": "abcdefgxyz", "max_tokens": 200}
    first = closed.http.post("/v1/completions", json=ask, headers=headers)
    assert first.status_code == 200, "what was accepted is answered whole"
    assert first.json()["usage"]["completion_tokens"] == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "60"
    over = closed.http.post("/v1/completions", json=ask, headers=headers)
    assert is_error(over, 429, "rate_limit_exceeded")
    assert (
        int(over.headers["retry-after"]) > 150
    )  # as many are owed, and more wanted, at one a second
    for answer in posts(closed, headers, MODEL.name):
        assert is_error(answer, 429, "rate_limit_exceeded")
    assert len(engine.submitted) == 1


def test_a_prompt_over_the_whole_rate_is_no_429(closed):
    headers = key_of(closed, tokens_per_minute=5)
    answer = closed.http.post("/v1/completions", json=ASK | {"prompt": "x" * 9}, headers=headers)
    assert is_error(answer, 400, "invalid_value")
    assert "at most 5" in answer.json()["error"]["message"]


def test_a_prompt_that_the_engine_refuses_is_not_charged(closed, engine):
    headers = key_of(closed, tokens_per_minute=20)
    ask = ASK | {"prompt": "x" * 300}
    assert closed.http.post("/v1/completions", json=ask, headers=headers).status_code == 400
    engine.refuse_with = ZeroDivisionError("broken")
    ask = ASK | {"prompt": "x" * 20, "max_tokens": 1}
    assert closed.http.post("/v1/completions", json=ask, headers=headers).status_code == 500
    engine.refuse_with = None
    assert closed.http.post("/v1/completions", json=ask, headers=headers).status_code == 200


def test_classifications_are_charged_too(closed):
    headers = key_of(closed, tokens_per_minute=10)
    body = CLASSIFY | {"input": "a long text to read"}
    assert closed.http.post("/v1/classify", json=body, headers=headers).status_code == 200
    answer = closed.http.post("/v1/classify", json=body, headers=headers)
    assert is_error(answer, 429, "rate_limit_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_requests_at_once_are_counted_until_the_last_byte(closed, engine, stream):
    headers = key_of(closed, max_concurrency=1)
    engine.reply = lambda _: "abc"
    engine.pause()
    answers: list[Any] = []

    def ask() -> None:
        body = ASK | {"stream": stream, "max_tokens": 3}
        answers.append(closed.http.post("/v1/completions", json=body, headers=headers))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: engine.num_open == 1, "the first request to be submitted")
    engine.step()  # of a stream, the first event is sent
    over = closed.http.post("/v1/completions", json=ASK, headers=headers)
    assert is_error(over, 429, "rate_limit_exceeded")
    assert over.headers["retry-after"] == "1"
    engine.resume()
    thread.join()
    assert [answer.status_code for answer in answers] == [200]
    assert "data: [DONE]" in answers[0].text or not stream
    assert closed.http.post("/v1/completions", json=ASK, headers=headers).status_code == 200


def test_metrics_tell_tenants_apart_to_operators_alone(in_process):
    with in_process(require_keys=True, metrics_public=True) as server:
        acme = key_of(server, tenant="acme", max_concurrency=5)
        assert server.http.post("/v1/completions", json=ASK, headers=acme).status_code == 200
        tenant_admin = key_of(server, tenant="acme", kind="admin")
        for headers in ({}, acme, tenant_admin, {"Authorization": "Bearer x"}):
            public = server.http.get("/metrics", headers=headers)
            assert public.status_code == 200
            assert "reft_prompt_tokens_total" in public.text
            assert "acme" not in public.text
        text = server.http.get("/metrics", headers=ADMIN).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert {
            (sample.labels["tenant"], sample.value)
            for sample in families["reft_tenant_prompt_tokens"].samples
            if sample.name.endswith("_total")
        } == {("acme", 2.0)}
        assert "reft_prompt_tokens" in families


def test_public_metrics_tell_that_the_database_is_away(in_process, monkeypatch):
    def fail(*_args: Any, **_conditions: Any) -> None:
        raise DatabaseUnavailable("the database does not answer")

    with in_process(key_cache_s=0) as server:
        monkeypatch.setattr(server.services.key_store, "any_ever", fail)
        monkeypatch.setattr(server.services.key_store, "find", fail)
        monkeypatch.setattr(server.services.registry, "all_current", fail)
        for headers in ({}, {"Authorization": f"Bearer {secret.generate()[0]}"}):
            answer = server.http.get("/metrics", headers=headers)
            assert answer.status_code == 200, answer.text
            assert "\nreft_registry_up{" in answer.text or "\nreft_registry_up 0" in answer.text
            assert "reft_tenant" not in answer.text


# Keys over HTTP -----------------------------------------------------------------------------


def test_a_key_made_over_http_works_until_it_is_revoked(server):
    assert server.http.get("/v1/models").status_code == 200, "open until there is a user key"
    fields = {"name": "bot", "tenant": "acme", "models": ["tone*"], "max_concurrency": 2}
    made = server.http.post("/admin/keys", json=fields, headers=ADMIN)
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    card = made.json()
    assert (card["tenant"], card["kind"], card["state"]) == ("acme", "user", "active")
    mine = {"Authorization": f"Bearer {card.pop('key')}"}
    assert server.http.get("/v1/models", headers=mine).status_code == 200
    find = server.services.key_store.find
    wait_until(lambda: find(card["id"]).last_used_at is not None, "its use to be noted")
    listed = server.http.get("/admin/keys", headers=ADMIN).json()["data"]
    assert [entry["id"] for entry in listed] == [card["id"]]
    assert listed[0]["last_used_at"] is not None
    assert "digest" not in listed[0]
    assert "key" not in listed[0]
    revoked = server.http.delete(f"/admin/keys/{card['id']}", headers=ADMIN)
    assert revoked.json()["state"] == "revoked"
    answer = server.http.get("/v1/models", headers=mine)
    assert is_error(answer, 401, "invalid_api_key")
    assert "revoked" in answer.json()["error"]["message"]
    unknown = server.http.delete(f"/admin/keys/{'0' * 16}", headers=ADMIN)
    assert is_error(unknown, 404, "not_found")


def test_the_first_user_key_closes_the_api_at_once_here(server):
    assert server.http.get("/v1/models").status_code == 200
    server.http.post("/admin/keys", json={"name": "bot"}, headers=ADMIN)
    assert is_error(server.http.get("/v1/models"), 401, "invalid_api_key")


def test_a_tenants_admin_manages_its_own_keys_alone(closed):
    admin = key_of(closed, "boss", tenant="acme", kind="admin")
    foreign = closed.services.key_store.create(NewKey(name="x", tenant="globex"))[1]
    shared = closed.services.key_store.create(NewKey(name="y"))[1]
    made = closed.http.post("/admin/keys", json={"name": "n", "tenant": "acme"}, headers=admin)
    assert made.status_code == 201
    for tenant in ("globex", "", "nobody"):
        body = {"name": "n", "tenant": tenant}
        assert forbidden(closed.http.post("/admin/keys", json=body, headers=admin))
        params = {"tenant": tenant}
        assert forbidden(closed.http.get("/admin/keys", params=params, headers=admin))
    assert forbidden(closed.http.post("/admin/keys", json={"name": "n"}, headers=admin))
    listed = closed.http.get("/admin/keys", headers=admin).json()["data"]
    assert {entry["tenant"] for entry in listed} == {"acme"}
    for key in (foreign, shared):
        answer = closed.http.delete(f"/admin/keys/{key.id}", headers=admin)
        assert is_error(answer, 404, "not_found")
    listed = closed.http.get("/admin/keys", headers=ADMIN).json()["data"]
    assert {entry["tenant"] for entry in listed} == {"acme", "globex", ""}
    assert {entry["state"] for entry in listed} == {"active"}
    one = closed.http.get("/admin/keys", params={"tenant": "globex"}, headers=ADMIN).json()["data"]
    assert [entry["id"] for entry in one] == [foreign.id]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "n", "tenant": "a b"}, "tenant"),
        ({"name": "n", "kind": "root"}, "kind"),
        ({"name": "n", "models": ["a@1"]}, "models"),
        ({"name": "n", "requests_per_minute": -1}, "requests_per_minute"),
        ({"name": "n", "tenat": "acme"}, "tenat"),
    ],
)
def test_what_no_key_may_be(closed, body, param):
    answer = closed.http.post("/admin/keys", json=body, headers=ADMIN)
    assert is_error(answer, 400, "invalid_value")
    assert answer.json()["error"]["param"].startswith(param)


def test_bodies_of_new_keys_are_capped(in_process):
    with in_process(max_body_bytes=1024) as server:
        answer = server.http.post("/admin/keys", json={"name": "x" * 2000}, headers=ADMIN)
        assert is_error(answer, 413, "request_too_large")


def test_logs_say_which_key_asked_and_never_the_key(closed, caplog):
    headers = key_of(closed, tenant="acme")
    with caplog.at_level("DEBUG"):
        closed.http.post("/v1/completions", json=ASK, headers=headers)
        made = closed.http.post("/admin/keys", json={"name": "n"}, headers=ADMIN).json()
    assert made["id"] in str([record.__dict__ for record in caplog.records])
    for hidden in (headers["Authorization"].split("_")[2], made["key"].split("_")[2], ADMIN_KEY):
        assert hidden not in str([record.__dict__ for record in caplog.records])


# What callers are not told ------------------------------------------------------------------


def test_outages_do_not_tell_callers_where_things_are(closed, monkeypatch, caplog):
    def find(key_id: str) -> None:
        raise DatabaseUnavailable("the database does not answer", reason="10.1.2.3 as user reft")

    monkeypatch.setattr(closed.services.key_store, "find", find)
    stranger = {"Authorization": f"Bearer {secret.generate()[0]}"}
    answer = closed.http.post("/v1/completions", json=ASK, headers=stranger)
    assert is_error(answer, 503, "database_unavailable")
    assert answer.json()["error"]["message"] == "the database does not answer"
    assert "10.1.2.3" in str([record.__dict__ for record in caplog.records])


def test_a_narrow_key_is_not_told_names_that_it_may_not_use(two_adapters):
    reft = {"models": ["support-nice"]}
    narrow, wide = key_of(two_adapters, models=("support-*",)), key_of(two_adapters)
    for headers, tells in ((narrow, False), (wide, True)):
        answers = posts(two_adapters, headers, "nobody")
        answers += posts(two_adapters, headers, "nobody", reft=reft)[:2]
        answers.append(two_adapters.http.get("/v1/models/nobody", headers=headers))
        for answer in answers[:3] + answers[5:]:
            assert is_error(answer, 404, "model_not_found")
            assert ("sales" in answer.text) is tells
        for answer in answers:
            assert "sales" not in answer.text or tells


@pytest.mark.parametrize(("within", "granted"), [(True, ("support-b", "support-*x")), (False, "*")])
def test_a_narrow_admin_makes_no_key_that_reaches_further(closed, within, granted):
    admin = key_of(closed, tenant="acme", kind="admin", models=("support-*",))
    for pattern in granted:
        body = {"name": "n", "tenant": "acme", "models": [pattern]}
        answer = closed.http.post("/admin/keys", json=body, headers=admin)
        assert answer.status_code == 201 if within else forbidden(answer)


def test_a_narrow_operator_loads_and_unloads_only_what_is_in_its_scope(in_process, tmp_path):
    (tmp_path / "tone.safetensors").write_bytes(make_adapter(1))
    with in_process(adapter_load_dir=tmp_path) as server:
        headers = key_of(server, kind="admin", models=("support-*",))
        server.upload("sales", make_adapter(2))
        load = {"name": "sales", "path": "tone.safetensors"}
        lora = {"lora_name": "sales", "lora_path": "tone.safetensors", "load_inplace": True}
        for path, body in (
            ("load_adapter", load),
            ("unload_adapter", {"name": "sales"}),
            ("load_lora_adapter", lora),
            ("unload_lora_adapter", {"lora_name": "sales"}),
        ):
            assert forbidden(server.http.post(f"/v1/{path}", json=body, headers=headers))
        mine = load | {"name": "support-tone"}
        answer = server.http.post("/v1/load_adapter", json=mine, headers=headers)
        assert answer.status_code == 200, answer.text


def test_no_database_is_asked_for_a_key_that_it_cannot_look_for(closed, monkeypatch):
    def revoke(*_: Any, **__: Any) -> None:
        raise AssertionError("PostgreSQL takes no NUL")

    monkeypatch.setattr(closed.services.key_store, "revoke", revoke)
    assert closed.http.delete("/admin/keys/a%00b", headers=ADMIN).status_code == 400
