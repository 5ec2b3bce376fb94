from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from reft_core.adapter_header import MAX_HEADER_BYTES
from reft_core.spec import METADATA_KEY
from tests.server.conftest import ADMIN, ADMIN_KEY
from tests.server.fakes import MODEL, make_adapter, make_loaded

GOOD = make_adapter(1)


def rebuild(change_tensors=None, change_spec=None, metadata=None) -> bytes:
    """The good file with its tensors or spec changed, past what the encoder would allow."""
    length = struct.unpack("<Q", GOOD[:8])[0]
    spec = json.loads(json.loads(GOOD[8 : 8 + length])["__metadata__"][METADATA_KEY])
    tensors = load(GOOD)
    if change_spec:
        change_spec(spec)
    if change_tensors:
        change_tensors(tensors)
    return save(tensors, metadata=metadata or {METADATA_KEY: json.dumps(spec)})


NAME = "layers.0.block_output.0.down"


def _set(tensors, value):
    tensors[NAME] = value


def _with(tensors, value):
    tensors[NAME][0, 0] = value


def _spec(*path, value):
    def change(spec):
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = value

    return change


SITE = ("sites", "block_output")
JINJA = {"chat_template": "{{ messages }}"}
BAD = {
    "a template that is code": (rebuild(None, _spec("template", value=JINJA)), ["chat_template"]),
    "a template without its place": (
        rebuild(None, _spec("template", value={"user": "{{ content }} {% raw %}"})),
        ["{content}"],
    ),
    "a template with half a character": (
        rebuild(None, _spec("template", value={"user": "\ud800{content}"})),
        ["spec"],
    ),
    "a template over its cap": (
        rebuild(None, _spec("template", value={"user": "x" * 8192 + "{content}"})),
        ["template.user"],
    ),
    "empty": (b"", ["body"]),
    "garbage": (b"garbage of some length", ["body"]),
    "a pickle": (b"\x80\x04\x95" + bytes(60), ["body"]),
    "header length beyond the file": (struct.pack("<Q", 10**6) + b"{}", ["body"]),
    "header over its cap": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 1),
        ["header", str(MAX_HEADER_BYTES + 1), str(MAX_HEADER_BYTES)],
    ),
    "header no JSON": (struct.pack("<Q", 4) + b"{{{{", ["header", "JSON"]),
    "header a list": (struct.pack("<Q", 2) + b"[]", ["header", "list", "object"]),
    "no spec": (save({NAME: torch.zeros(8, 2)}, metadata={"x": "y"}), ["__metadata__", "x"]),
    "spec no JSON": (rebuild(metadata={METADATA_KEY: "{"}), ["spec"]),
    "unknown spec key": (rebuild(change_spec=_spec("surprise", value=1)), ["spec.surprise"]),
    "another format": (
        rebuild(change_spec=_spec("format_version", value=2)),
        ["spec.format_version", "2", "1"],
    ),
    "truncated": (GOOD[:-4], ["body"]),
    "trailing bytes": (GOOD + b"\0\0\0\0", ["body"]),
    "missing tensor": (rebuild(lambda t: t.pop(NAME)), [NAME, "missing", "(8, 2)"]),
    "extra tensor": (rebuild(lambda t: t.update(extra=torch.zeros(1))), ["tensors", "extra"]),
    "other shape": (
        rebuild(lambda t: _set(t, torch.zeros(8, 3))),
        [f"{NAME}.shape", "[8, 3]", "[8, 2]"],
    ),
    "other dtype": (
        rebuild(lambda t: _set(t, torch.zeros(8, 2, dtype=torch.float64))),
        [f"{NAME}.dtype", "F64", "F32"],
    ),
    "NaN": (rebuild(lambda t: _with(t, float("nan"))), [NAME, "NaN", "finite"]),
    "infinity": (rebuild(lambda t: _with(t, float("-inf"))), [NAME, "infinity", "finite"]),
    "rank zero": (rebuild(change_spec=_spec(*SITE, "rank", value=0)), ["rank"]),
    "rank above the hidden size": (
        rebuild(change_spec=_spec(*SITE, "rank", value=9)),
        ["rank", "9", "8"],
    ),
    "layer out of range": (
        rebuild(change_spec=_spec(*SITE, "layers", value=[0, 2])),
        ["layers", "2", "at most 1"],
    ),
    "negative layer": (rebuild(change_spec=_spec(*SITE, "layers", value=[-1])), ["layers"]),
    "bad position rule": (
        rebuild(change_spec=_spec("positions", "rule", value="f7-l7")),
        ["positions", "f7-l7"],
    ),
    "other hidden size": (
        make_adapter(1, base=replace(MODEL, hidden_size=16).to_base_spec()),
        ["base.hidden_size", "16", "8"],
    ),
    "other number of layers": (
        make_adapter(1, base=replace(MODEL, num_layers=3).to_base_spec()),
        ["base.num_layers", "3", "2"],
    ),
    "other architecture": (
        make_adapter(1, base=replace(MODEL, architecture="gpt2").to_base_spec()),
        ["base.architecture", "gpt2", "llama"],
    ),
    "other model of the same size": (
        make_adapter(1, base=replace(MODEL, fingerprint="cd" * 32).to_base_spec()),
        ["base.fingerprint"],
    ),
}


def assert_nothing_there(server, engine):
    assert server.http.get("/admin/adapters", headers=ADMIN).json()["data"] == []
    assert len(server.http.get("/v1/models").json()["data"]) == 1
    blobs = server.services.settings.data_dir / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file()] == []
    assert engine.loads == []
    answer = server.http.post("/v1/completions", json={"model": "bad", "prompt": "x"})
    assert answer.status_code == 404


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_the_reason_and_leaves_nothing(server, engine, case):
    data, mentions = BAD[case]
    answer = server.http.post("/admin/adapters/bad", content=data, headers=ADMIN)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("adapter_file_invalid", "adapter_mismatch")
    for mention in mentions:
        assert mention in error["message"]
    assert_nothing_there(server, engine)


def test_a_file_over_the_cap_is_refused_by_its_declared_length(in_process, engine):
    with in_process(max_adapter_bytes=1024) as server:
        answer = server.http.post("/admin/adapters/bad", content=b"x" * 1025, headers=ADMIN)
        assert answer.status_code == 413
        assert "got 1025 bytes, expected at most 1024" in answer.json()["error"]["message"]
        assert_nothing_there(server, engine)


def test_a_file_over_the_cap_without_a_length_is_not_read_to_its_end(on_socket, engine):
    """The client would send for ever; it is answered once the cap is passed."""
    with on_socket(max_adapter_bytes=1024) as server:
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=5) as connection:
            connection.sendall(
                b"POST /admin/adapters/bad HTTP/1.1\r\nHost: x\r\n"
                b"Transfer-Encoding: chunked\r\n"
                b"Authorization: Bearer " + ADMIN_KEY.encode() + b"\r\n\r\n"
            )
            connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            connection.sendall(b"1\r\nx\r\n")  # one byte too many, and no end
            reply = b""
            while part := connection.recv(65536):
                reply += part
        assert reply.startswith(b"HTTP/1.1 413 ")
        assert b"expected at most 1024 bytes" in reply
        assert_nothing_there(server, engine)


@pytest.mark.parametrize("declared", [True, False])
def test_a_client_that_sends_before_it_reads_gets_its_refusal(on_socket, declared):
    """Not a connection that is reset, as it is when it is closed with data unread."""
    part = b"x" * 50_000
    with on_socket(max_adapter_bytes=1024) as server:
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=5) as connection:
            length = "Content-Length: 500000" if declared else "Transfer-Encoding: chunked"
            connection.sendall(
                b"POST /admin/adapters/bad HTTP/1.1\r\nHost: x\r\n"
                b"Authorization: Bearer %b\r\n%b\r\n\r\n" % (ADMIN_KEY.encode(), length.encode())
            )
            for _ in range(10):
                connection.sendall(part if declared else b"c350\r\n" + part + b"\r\n")
                time.sleep(0.02)  # by now it has been answered
            connection.sendall(b"" if declared else b"0\r\n\r\n")
            reply = b""
            while data := connection.recv(65536):
                reply += data
        assert reply.startswith(b"HTTP/1.1 413 ")
        assert b"expected at most 1024 bytes" in reply
        assert server.http.get("/healthz").status_code == 200


def test_a_form_is_explained(server, engine):
    answer = server.http.post(
        "/admin/adapters/bad", files={"file": ("x.safetensors", GOOD)}, headers=ADMIN
    )
    assert answer.status_code == 415
    assert "bytes as the body" in answer.json()["error"]["message"]
    assert_nothing_there(server, engine)


@pytest.mark.parametrize("name", ["-x", "a%20b", "x" * 97, "..%2fetc", "%2e%2e", "a%00b"])
def test_a_bad_name_is_refused(server, engine, name):
    answer = server.http.post(f"/admin/adapters/{name}", content=GOOD, headers=ADMIN)
    assert answer.status_code in (400, 404, 405)
    assert "error" in answer.json()
    assert_nothing_there(server, engine)


def test_the_base_models_name_is_a_conflict(server):
    answer = server.http.post(f"/admin/adapters/{MODEL.name}", content=GOOD, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["param"]) == (409, "name")


def test_uploads_count_versions_and_repeat_harmlessly(server):
    first = server.http.post("/admin/adapters/tone", content=GOOD, headers=ADMIN)
    assert first.status_code == 201
    body = first.json()
    assert (body["name"], body["version"], body["created"]) == ("tone", 1, True)
    assert (body["num_bytes"], body["num_users"]) == (len(GOOD), None)
    again = server.http.post("/admin/adapters/tone", content=GOOD, headers=ADMIN)
    assert (again.status_code, again.json()["created"]) == (200, False)
    assert again.json()["digest"] == body["digest"]
    assert server.upload("tone", make_adapter(2))["version"] == 2


def test_inspecting_and_listing(server):
    digest = server.upload("tone", GOOD)["digest"]
    server.upload("tone", make_adapter(2))
    server.upload("other", GOOD)
    listed = server.http.get("/admin/adapters", headers=ADMIN).json()["data"]
    assert [(card["name"], card["version"]) for card in listed] == [("other", 1), ("tone", 2)]
    server.http.post("/v1/completions", json={"model": "tone@1", "prompt": "x"})
    detail = server.http.get("/admin/adapters/tone", headers=ADMIN).json()
    assert (detail["name"], detail["current"]) == ("tone", 2)
    assert [card["num_users"] for card in detail["versions"]] == [0, None]
    assert detail["versions"][0]["digest"] == digest
    assert detail["spec"]["description"] == "seed 2"
    for method in ("GET", "DELETE"):
        answer = server.http.request(method, "/admin/adapters/nope", headers=ADMIN)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_deleting_unloads(server, engine):
    digest = server.upload("tone", GOOD)["digest"]
    server.http.post("/v1/completions", json={"model": "tone", "prompt": "x"})
    assert engine.adapters == {digest}
    answer = server.http.delete("/admin/adapters/tone", headers=ADMIN)
    assert answer.json() == {"name": "tone", "deleted_versions": [1]}
    assert engine.adapters == set()
    assert_nothing_after_delete(server)


def assert_nothing_after_delete(server):
    gone = server.http.post("/v1/completions", json={"model": "tone", "prompt": "x"})
    assert gone.status_code == 404


def test_an_adapter_named_twice_stays_when_one_name_goes(server, engine):
    digest = server.upload("tone", GOOD)["digest"]
    server.upload("voice", GOOD)
    server.http.post("/v1/completions", json={"model": "tone", "prompt": "x"})
    server.http.delete("/admin/adapters/tone", headers=ADMIN)
    assert engine.adapters == {digest}
    kept = server.http.post("/v1/completions", json={"model": "voice", "prompt": "x"})
    assert kept.status_code == 200


def test_files_of_the_operator_are_registered_at_start(in_process, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(make_adapter(1, name="one"))
    (folder / "notes.txt").write_text("not an adapter")
    single = tmp_path / "x.safetensors"
    single.write_bytes(make_adapter(2, name="two"))
    with in_process(adapters=(folder, single)) as server:
        models = [card["id"] for card in server.http.get("/v1/models").json()["data"]]
        assert models == [MODEL.name, "one", "two"]
        answer = server.http.post("/v1/completions", json={"model": "two", "prompt": "x"})
        assert answer.status_code == 200


def test_a_start_with_a_bad_file_fails_with_the_reason(in_process, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(GOOD[:-1])
    with pytest.raises(Exception, match="body"), in_process(adapters=(bad,)):
        raise AssertionError("it started")
    with pytest.raises(Exception, match="adapters: got"), in_process(adapters=(tmp_path / "no",)):
        raise AssertionError("it started")


def test_a_load_that_fails_is_an_error_of_that_request_only(server, engine):
    server.upload("tone", GOOD)
    engine.load_failure = RuntimeError("out of memory")
    answer = server.http.post("/v1/completions", json={"model": "tone", "prompt": "x"})
    assert answer.status_code == 500
    engine.load_failure = None
    answer = server.http.post("/v1/completions", json={"model": "tone", "prompt": "x"})
    assert answer.status_code == 200


def test_the_fixtures_are_what_they_claim():
    assert len(make_loaded().tokenizer) <= MODEL.vocab_size
    assert torch.isfinite(load(GOOD)[NAME]).all()
