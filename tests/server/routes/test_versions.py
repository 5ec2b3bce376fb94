from __future__ import annotations

import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.conftest import ADMIN
from tests.server.fakes import make_adapter, wait_until


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_promote_roll_back_and_delete_a_version(server):
    digests = [server.upload("tone", make_adapter(seed))["digest"] for seed in (1, 2)]
    base = "/admin/adapters/tone"
    promoted = server.http.post(f"{base}/versions/1/promote", headers=ADMIN)
    assert (promoted.status_code, promoted.json()["digest"]) == (200, digests[0])
    detail = server.http.get(base, headers=ADMIN).json()
    assert (detail["current"], detail["previous"]) == (1, 2)
    assert server.http.post(f"{base}/rollback", headers=ADMIN).json()["version"] == 2
    refused = server.http.delete(f"{base}/versions/2", headers=ADMIN)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_conflict")
    gone = server.http.delete(f"{base}/versions/1", headers=ADMIN)
    assert gone.json() == {"name": "tone", "deleted_versions": [1]}
    assert server.http.post(f"{base}/rollback", headers=ADMIN).status_code == 409
    for number in ("1", "3", "999999999"):
        unknown = server.http.post(f"{base}/versions/{number}/promote", headers=ADMIN)
        assert unknown.status_code == 404
    for number in ("0", "-1", "x", "1000000000"):
        bad = server.http.post(f"{base}/versions/{number}/promote", headers=ADMIN)
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "number")


def test_inspecting_one_version(server):
    server.upload("tone", make_adapter(1))
    server.upload("tone", make_adapter(2))
    detail = server.http.get("/admin/adapters/tone@1", headers=ADMIN).json()
    assert (detail["name"], detail["current"]) == ("tone", 2)
    assert detail["spec"]["description"] == "seed 1"


@pytest.mark.parametrize("reference", ["tone", "tone@1", "tone@sha256:{digest}"])
def test_a_download_is_the_exact_file(server, reference):
    data = make_adapter(1)
    digest = server.upload("tone", data)["digest"]
    path = f"/admin/adapters/{reference.format(digest=digest)}/file"
    answer = server.http.get(path, headers=ADMIN)
    assert answer.content == data
    assert answer.headers["etag"] == f'"{digest}"'
    wanted = base64.b64encode(hashlib.sha256(data).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{wanted}:"
    assert "tone@1.safetensors" in answer.headers["content-disposition"]
    again = server.http.get(path, headers={**ADMIN, "If-None-Match": f'W/"x", "{digest}"'})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.get("/admin/adapters/nope/file", headers=ADMIN).status_code == 404
    assert server.http.get("/admin/adapters/tiny-base/file", headers=ADMIN).status_code == 404


def test_a_promised_digest_is_checked(server):
    data, path = make_adapter(1), "/admin/adapters/tone"
    for promised, status in (("0" * 64, 400), ("x", 400), (digest_of(data), 201)):
        headers = {**ADMIN, "X-Expected-SHA256": promised}
        answer = server.http.post(path, content=data, headers=headers)
        assert answer.status_code == status, answer.text
        if status == 400:
            assert answer.json()["error"]["param"].lower() == "x-expected-sha256"
    temporary = server.services.settings.data_dir / "blobs" / "incoming"
    assert list(temporary.iterdir()) == []


def test_names_of_tenants_are_apart(server):
    own, shared = make_adapter(1), make_adapter(2)
    path = "/admin/adapters/tone"
    server.upload("tone", shared)
    posted = server.http.post(path, params={"tenant": "acme"}, content=own, headers=ADMIN)
    assert (posted.status_code, posted.json()["tenant"]) == (201, "acme")
    listed = server.http.get("/admin/adapters", headers=ADMIN).json()["data"]
    assert [(card["tenant"], card["name"]) for card in listed] == [("", "tone"), ("acme", "tone")]
    filtered = server.http.get("/admin/adapters", params={"tenant": "acme"}, headers=ADMIN)
    assert [card["digest"] for card in filtered.json()["data"]] == [digest_of(own)]
    first = server.http.get("/admin/adapters", params={"limit": 1}, headers=ADMIN).json()
    assert (len(first["data"]), first["has_more"]) == (1, True)
    after = {"after": "tone", "after_tenant": "", "limit": 1}
    rest = server.http.get("/admin/adapters", params=after, headers=ADMIN).json()
    assert (rest["data"][0]["tenant"], rest["has_more"]) == ("acme", False)
    server.http.delete(path, params={"tenant": "acme"}, headers=ADMIN)
    assert server.http.get(path, headers=ADMIN).json()["versions"][0]["digest"] == digest_of(shared)
    bad = server.http.get(path, params={"tenant": "../x"}, headers=ADMIN)
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "tenant")


def test_the_audit_log_has_pages(server):
    for seed in (1, 2):
        server.upload("tone", make_adapter(seed))
    server.http.delete("/admin/adapters/tone", headers=ADMIN)
    page = server.http.get("/admin/audit", params={"limit": 3}, headers=ADMIN).json()
    assert [entry["action"] for entry in page["data"]] == ["delete", "delete", "upload"]
    assert "admin" in page["data"][0]["actor"]
    assert page["has_more"]
    before = {"before": page["data"][-1]["id"]}
    rest = server.http.get("/admin/audit", params=before, headers=ADMIN).json()
    assert [entry["number"] for entry in rest["data"]] == [1]
    assert not rest["has_more"]
    assert server.http.get("/admin/audit").status_code == 401


@pytest.mark.parametrize("query", ["after=%00", "prefix=%00", "method=%00", "limit=0", "limit=9e9"])
def test_bad_queries_are_refused(server, query):
    answer = server.http.get(f"/admin/adapters?{query}", headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.split("=")[0])


def test_a_deleted_adapter_answers_404_while_its_requests_finish(on_socket, engine):
    """Its file stays until they have, and then goes."""
    with on_socket(delete_grace_s=0, registry_poll_s=0.02) as server:
        digest = server.upload("tone", make_adapter(1))["digest"]
        blobs = server.services.settings.data_dir / "blobs"
        engine.pause()
        body = {"model": "tone", "prompt": "x"}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.http.post, "/v1/completions", json=body)
            wait_until(lambda: bool(engine.submitted), "the request to run")
            server.http.delete("/admin/adapters/tone", headers=ADMIN)
            assert server.http.post("/v1/completions", json=body).status_code == 404
            assert len(list(blobs.glob("??/*"))) == 1
            assert engine.adapters == {digest}
            engine.resume()
            assert running.result().status_code == 200
        wait_until(lambda: not list(blobs.glob("??/*")), "the file to go")
        assert engine.adapters == set()


def test_a_database_that_fails_is_a_503_with_a_time_to_retry(server, monkeypatch):
    from sqlalchemy import Engine
    from sqlalchemy.exc import OperationalError

    def fail(self):
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(Engine, "connect", fail)
    answer = server.http.post("/v1/completions", json={"model": "tone", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"]
    monkeypatch.undo()
