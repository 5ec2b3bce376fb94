"""What holds for every route: error shape, keys, request ids, body caps, health, metrics."""

from __future__ import annotations

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from reft_core.errors import EngineUnavailable
from tests.server.conftest import ADMIN, ADMIN_KEY, API_KEY
from tests.server.fakes import MODEL, make_adapter

ASK = {"model": MODEL.name, "prompt": "hi"}


def is_openai_error(answer, status: int, code: str) -> bool:
    error = answer.json()["error"]
    return (
        answer.status_code == status
        and set(error) == {"message", "type", "param", "code"}
        and error["code"] == code
        and bool(error["message"])
    )


def test_unknown_paths_and_methods(server):
    assert is_openai_error(server.http.get("/nope"), 404, "not_found")
    answer = server.http.get("/v1/completions")
    assert is_openai_error(answer, 405, "method_not_allowed")
    assert "POST" in answer.json()["error"]["message"]


def test_bodies_that_are_no_json(server):
    kind = {"content-type": "application/json"}
    for body in (b"{", b"", b"[]", b"\xff", b'{"model": ' + b"[" * 100_000, b"1" * 5000):
        answer = server.http.post("/v1/completions", content=body, headers=kind)
        assert 400 <= answer.status_code < 500, body[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = server.http.post("/v1/completions", content=b'{"a": }', headers=kind)
    assert "character 6" in answer.json()["error"]["message"]


def test_bodies_of_another_type(server):
    for kind in ("text/plain", "multipart/form-data; boundary=x", ""):
        answer = server.http.post(
            "/v1/completions", content=b'{"model": "m"}', headers={"content-type": kind}
        )
        assert is_openai_error(answer, 415, "unsupported_media_type")
        assert "application/json" in answer.json()["error"]["message"]


def test_lone_surrogates_are_refused_and_not_a_crash(server):
    body = b'{"model": "\\ud800", "prompt": "\\ud800", "\\udfff": 1}'
    answer = server.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert is_openai_error(answer, 400, "invalid_value")


def test_bodies_over_the_cap(in_process):
    with in_process(max_body_bytes=1024) as server:
        kind = {"content-type": "application/json"}
        declared = server.http.post("/v1/completions", content=b"x" * 1025, headers=kind)
        assert is_openai_error(declared, 413, "request_too_large")

        def chunks():
            yield from (b"x" * 600 for _ in range(3))

        undeclared = server.http.post("/v1/completions", content=chunks(), headers=kind)
        assert is_openai_error(undeclared, 413, "request_too_large")
        assert "1024" in undeclared.json()["error"]["message"]
        fitting = server.http.post("/v1/completions", json=ASK)
        assert fitting.status_code == 200


def test_unexpected_exceptions_are_answered_logged_and_not_shown(server, engine, caplog):
    engine.refuse_with = ZeroDivisionError("secret detail")
    with caplog.at_level(logging.ERROR):
        answer = server.http.post("/v1/completions", json=ASK)
    assert is_openai_error(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    assert server.http.get("/healthz").status_code == 200
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info[0] is ZeroDivisionError


def test_request_ids(server):
    given = server.http.get("/healthz", headers={"x-request-id": "trace-1.2:3"})
    assert given.headers["x-request-id"] == "trace-1.2:3"
    for bad in ("", "a b", "x" * 129, "<script>"):
        made = server.http.get("/healthz", headers={"x-request-id": bad})
        assert made.headers["x-request-id"] != bad
        assert len(made.headers["x-request-id"]) == 32
    error = server.http.get("/nope", headers={"x-request-id": "kept"})
    assert error.headers["x-request-id"] == "kept"


@pytest.mark.parametrize(
    "fields",
    [
        b'"prompt": "\\ud800"',
        b'"prompt": ["a", "\\udfff"]',
        b'"prompt": "a", "reft": {"source": "\\ud800"}',
        b'"prompt": "a", "stop": ["\\ud800"]',
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(server, fields):
    kind = {"content-type": "application/json"}
    body = b'{"model": "tiny-base", ' + fields + b"}"
    answer = server.http.post("/v1/completions", content=body, headers=kind)
    assert is_openai_error(answer, 400, "invalid_value")
    assert "surrogates" in answer.json()["error"]["message"]


# Keys ---------------------------------------------------------------------------------------

V1 = [("GET", "/v1/models"), ("GET", "/v1/models/x"), ("POST", "/v1/completions"),
      ("POST", "/v1/chat/completions")]  # fmt: skip
ADMIN_ROUTES = [("GET", "/admin/adapters"), ("GET", "/admin/adapters/x"),
                ("POST", "/admin/adapters/x"), ("DELETE", "/admin/adapters/x")]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), V1)
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", f"Bearer {ADMIN_KEY}", API_KEY, f"Basic {API_KEY}", "Bearer ü"]
)
def test_v1_needs_the_api_key_if_one_is_set(in_process, engine, method, path, header):
    with in_process(api_key=API_KEY) as server:
        headers = {} if header is None else {"authorization": header.encode()}
        answer = server.http.request(method, path, headers=headers)
        assert is_openai_error(answer, 401, "invalid_api_key")
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert API_KEY not in answer.text


def test_the_right_key_is_let_in(in_process):
    with in_process(api_key=API_KEY) as server:
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} {API_KEY}"}
            assert server.http.get("/v1/models", headers=headers).status_code == 200
            answer = server.http.post("/v1/completions", json=ASK, headers=headers)
            assert answer.status_code == 200
        for open_path in ("/healthz", "/readyz", "/metrics"):
            assert server.http.get(open_path).status_code == 200


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_admin_needs_the_admin_key(in_process, method, path):
    with in_process(api_key=API_KEY) as server:
        for headers in ({}, {"authorization": f"Bearer {API_KEY}"}):
            answer = server.http.request(method, path, headers=headers)
            assert is_openai_error(answer, 401, "invalid_api_key")


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_without_an_admin_key_nobody_is_an_admin(in_process, method, path):
    with in_process(admin_key=None) as server:
        for headers in ({}, ADMIN):
            answer = server.http.request(method, path, headers=headers)
            assert is_openai_error(answer, 401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/v1/completions", "/admin/adapters/x"])
def test_keys_are_checked_before_the_body_is_read(in_process, path):
    async def receive():
        raise AssertionError("the body was read")

    sent = []

    async def send(message):
        sent.append(message)

    with in_process(api_key=API_KEY) as server:
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        server.http.portal.call(server.http.app, scope, receive, send)
    assert sent[0]["status"] == 401


# Health and metrics -------------------------------------------------------------------------


def test_health_and_readiness(server, engine):
    assert server.http.get("/healthz").json() == {"status": "ok"}
    assert server.http.get("/readyz").json() == {"status": "ready"}
    engine.healthy = False
    assert server.http.get("/healthz").status_code == 503
    assert server.http.get("/readyz").status_code == 503


def test_a_server_that_is_ending_is_alive_but_not_ready(server, engine):
    server.http.portal.call(server.services.lifecycle.drain)
    assert server.http.get("/healthz").status_code == 200
    answer = server.http.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"status": "draining"})
    refused = server.http.post("/v1/completions", json=ASK)
    assert is_openai_error(refused, 503, "engine_unavailable")
    assert refused.headers["retry-after"]


def test_an_engine_that_is_unavailable_is_a_503(server, engine):
    engine.refuse_with = EngineUnavailable("the engine died")
    answer = server.http.post("/v1/completions", json=ASK)
    assert is_openai_error(answer, 503, "engine_unavailable")


def scrape(server) -> dict[str, float]:
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("reft_"):
                assert labels.pop("model_name") == MODEL.name
            found[sample.name + "".join(f" {k}={v}" for k, v in sorted(labels.items()))] = (
                sample.value
            )
    return found


def test_metrics_tell_what_happened(server, engine):
    server.upload("tone", make_adapter(1))
    server.http.post("/v1/completions", json=ASK | {"model": "tone", "max_tokens": 3, "n": 2})
    server.http.post("/v1/completions", json=ASK | {"model": "tone", "max_tokens": 99})
    engine.reply = lambda _: "a b c d e f"
    server.http.post("/v1/completions", json=ASK | {"max_tokens": 99, "stop": "c"})
    server.http.get("/v1/models/secret-name")
    for path in ("/some/wild/path", "/v1/completions"):
        server.http.request("BREW", path)
    server.http.request("BREW", "/another")
    found = scrape(server)
    assert found["reft_num_requests_waiting"] == 3
    assert found["reft_num_requests_running"] == 0
    assert found["reft_kv_cache_usage_perc"] == 0.25
    assert found["reft_prompt_tokens_total"] == 8 + 11
    assert found["reft_prompt_tokens_by_source_total source=local_compute"] == 8
    assert found["reft_prompt_tokens_by_source_total source=local_cache_hit"] == 11
    assert found["reft_prefix_cache_queries_total"] == 8 + 11
    assert found["reft_prefix_cache_hits_total"] == 11
    assert found["reft_prefix_tokens_shared_across_adapters_total"] == 5
    assert found["reft_kv_saved_bytes_total"] == 11 * 64
    assert found["reft_num_preemptions_total"] == 1
    assert found["reft_cache_config_info block_size=16 num_gpu_blocks=6"] == 1
    assert found["reft_adapter_requests_total adapter=tone tenant="] == 2
    assert found["reft_adapter_requests_total adapter=(base) tenant="] == 1
    assert found["reft_adapter_requests_total adapter=(other) tenant="] == 0
    assert found["reft_adapters_in_use"] == 0
    assert found["reft_adapter_swap_seconds_count"] == 0
    assert found["reft_ready"] == found["reft_registry_up"] == 1
    assert found["process_start_time_seconds"] > 0
    assert found["reft_request_prompt_tokens_count"] == 4
    assert found["reft_request_prompt_tokens_sum"] == 8
    assert found["reft_request_params_max_tokens_bucket le=5.0"] == 2
    assert found["reft_request_generation_tokens_count"] == 4
    assert found["reft_request_time_per_output_token_seconds_count"] == 4
    assert found["reft_generation_tokens_total"] == engine.num_tokens
    assert found["reft_edits_applied_total"] == 7
    assert found["reft_resident_adapters"] == 1
    assert found["reft_adapter_resident_bytes"] > 0
    assert found["reft_adapter_cold_loads_total"] == 1
    assert found["reft_adapter_load_seconds_count"] == 1
    assert found["reft_adapter_references"] == found["reft_adapters_waiting"] == 0
    assert found["reft_adapter_evictions_total"] == found["reft_adapters_pinned"] == 0
    assert found["reft_adapter_budget_bytes"] == 2**30
    held, free = found["reft_prefix_cache_blocks"], found["reft_prefix_cache_blocks_free"]
    assert held + free == found["reft_prefix_cache_blocks_max"] == 5
    assert found["reft_request_success_total finished_reason=length"] == 2
    assert found["reft_request_success_total finished_reason=stop"] == 2
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert found[f"reft_{name}_seconds_count"] == 4
    assert found["reft_inter_token_latency_seconds_count"] >= 10
    for name in ("queue", "prefill", "decode", "inference"):
        assert found[f"reft_request_{name}_time_seconds_count"] >= 3
    posted = "reft_http_requests_total method=POST route="
    assert found[f"{posted}/v1/completions status=200"] == 3
    assert found[f"{posted}/admin/adapters/{{name}} status=201"] == 1
    assert found["reft_http_requests_total method=other route=unmatched status=404"] == 2
    assert not any("secret-name" in name or "wild" in name for name in found)


def test_metrics_of_two_servers_are_apart(server, in_process):
    server.http.get("/healthz")
    assert "reft_adapter_cold_loads_total" in scrape(server)
    from server.observability.metrics import Metrics

    assert Metrics().registry is not server.services.metrics.registry
    assert Metrics().for_operators is not server.services.metrics.for_operators


def test_the_api_documents_itself(server):
    document = server.http.get("/openapi.json").json()
    paths = document["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/admin/adapters/{name}"} <= set(paths)
    post = paths["/v1/completions"]["post"]
    assert {"200", "400", "404", "413", "415", "429", "500", "503", "504"} <= set(post["responses"])
    assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "retry-after" in post["responses"]["429"]["headers"]
    for response in post["responses"].values():
        assert "x-request-id" in response["headers"]
    assert post["security"] == [{}, {"ApiKey": []}], "no key is set"
    assert paths["/admin/adapters"]["get"]["security"] == [{"AdminKey": []}]
    assert set(paths["/healthz"]["get"]["responses"]) == {"200", "500", "503"}


def test_the_document_has_the_limits_of_this_server(in_process):
    with in_process(api_key=API_KEY, max_n=3, max_stop=5, max_fan_out=7) as server:
        document = server.http.get("/openapi.json", headers=ADMIN).json()
        fields = document["components"]["schemas"]["ChatRequest"]["properties"]
        assert fields["n"]["anyOf"][0]["maximum"] == 3
        assert fields["stop"]["anyOf"][1]["maxItems"] == 5
        assert fields["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
        assert fields["tools"]["enum"] == [None, []]
        options = document["components"]["schemas"]["FanOutOptions"]["properties"]
        assert options["models"]["anyOf"][0]["maxItems"] == 7
        post = document["paths"]["/v1/chat/completions"]["post"]
        assert post["security"] == [{"ApiKey": []}]
        assert "www-authenticate" in post["responses"]["401"]["headers"]


def test_a_wrong_method_is_told_all_that_a_path_takes(server):
    answer = server.http.patch("/admin/adapters/x", headers=ADMIN)
    assert is_openai_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, POST, DELETE"
    assert answer.headers["allow"] in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/admin/adapters"])
def test_a_page_longer_than_any_is_refused(server, path):
    for limit in (0, 1_000_001, 10**30):
        answer = server.http.get(path, params={"limit": limit}, headers=ADMIN)
        assert is_openai_error(answer, 400, "invalid_value")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"echo": 0}, "echo"),
        ({"temperature": "0.5"}, "temperature"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"reft": {"strength": "1"}}, "reft.strength"),
        ({"reft": {"subspaces": {"a": "1"}}}, "reft.subspaces"),
        ({"reft": {"source": ["1"]}}, "reft.source"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
    ],
)
def test_no_value_is_made_of_another_type(server, body, field):
    answer = server.http.post("/v1/completions", json=ASK | body)
    assert is_openai_error(answer, 400, "invalid_value")
    assert answer.json()["error"]["param"] == field
    assert server.http.post("/v1/completions", json=ASK | {"n": 1.0}).status_code == 200
