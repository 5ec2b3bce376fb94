"""Loading by path: ``/v1/load_adapter`` and vLLM's ``/v1/load_lora_adapter``."""

from __future__ import annotations

import os

import pytest

from server.adapters.load_dir import read_below
from tests.server.conftest import ADMIN, API_KEY
from tests.server.fakes import MODEL, make_adapter

GOOD = make_adapter(1)


@pytest.fixture
def shelf(tmp_path):
    """A folder to load from, and things beside it that must not be read."""
    root = tmp_path / "shelf"
    (root / "tone").mkdir(parents=True)
    (root / "tone" / "adapter.safetensors").write_bytes(GOOD)
    (root / "mood.safetensors").write_bytes(make_adapter(2))
    (root / "two").mkdir()
    for name in "ab":
        (root / "two" / f"{name}.safetensors").write_bytes(GOOD)
    (root / "bad.safetensors").write_bytes(b"no adapter")
    (tmp_path / "secret.safetensors").write_bytes(GOOD)
    (tmp_path / "shelf-too").mkdir()
    (tmp_path / "shelf-too" / "secret.safetensors").write_bytes(GOOD)
    (root / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "up").symlink_to(tmp_path)
    (root / "within.safetensors").symlink_to(root / "mood.safetensors")
    (root / "loop.safetensors").symlink_to(root / "loop.safetensors")
    os.mkfifo(root / "pipe.safetensors")
    return root


@pytest.fixture
def server(in_process, shelf):
    with in_process(adapter_load_dir=shelf) as running:
        yield running


def post(server, route, headers=ADMIN, **body):
    return server.http.post(f"/v1/{route}", json=body, headers=headers)


def names(server) -> list[str]:
    cards = server.http.get("/admin/adapters", headers=ADMIN).json()["data"]
    return [card["name"] for card in cards]


def test_in_vllms_words(server):
    load = {"lora_name": "tone", "lora_path": "tone"}
    answer = post(server, "load_lora_adapter", **load)
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'tone' added successfully.",
    )
    assert answer.headers["content-type"].startswith("text/plain")
    completion = {"model": "tone", "prompt": "hi"}
    assert server.http.post("/v1/completions", json=completion).status_code == 200

    again = post(server, "load_lora_adapter", **load)
    assert again.status_code == 400
    assert "'tone' has already been loaded" in again.json()["error"]["message"]
    changed = {"lora_name": "tone", "lora_path": "mood.safetensors"}
    assert post(server, "load_lora_adapter", **changed).status_code == 400
    replaced = post(server, "load_lora_adapter", **changed, load_inplace=True)
    assert replaced.status_code == 200
    versions = server.http.get("/admin/adapters/tone", headers=ADMIN).json()["versions"]
    assert [card["version"] for card in versions] == [1, 2]

    gone = post(server, "unload_lora_adapter", lora_name="tone", lora_int_id=None)
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'tone' removed successfully.",
    )
    assert names(server) == []
    missing = post(server, "unload_lora_adapter", lora_name="tone")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "lora_name")


def test_in_our_words(server, shelf):
    answer = post(server, "load_adapter", name="tone", path=str(shelf / "tone"))
    assert answer.status_code == 200, answer.text
    assert (answer.json()["version"], answer.json()["created"]) == (1, True)
    again = post(server, "load_adapter", name="tone", path="tone/adapter.safetensors")
    assert again.json() == answer.json() | {"created": False}
    gone = post(server, "unload_adapter", name="tone")
    assert gone.json() == {"name": "tone", "deleted_versions": [1]}
    assert post(server, "unload_adapter", name="tone").json()["error"]["param"] == "name"
    assert (shelf / "tone" / "adapter.safetensors").read_bytes() == GOOD


def test_a_link_that_stays_below_is_followed(server):
    assert post(server, "load_adapter", name="x", path="within.safetensors").status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("../secret.safetensors", 400, "invalid_value"),
        ("tone/../../secret.safetensors", 400, "invalid_value"),
        ("../shelf-too/secret.safetensors", 400, "invalid_value"),
        ("../not-there.safetensors", 400, "invalid_value"),
        ("/etc/passwd", 400, "invalid_value"),
        ("/", 400, "invalid_value"),
        ("out.safetensors", 400, "invalid_value"),
        ("up/secret.safetensors", 400, "invalid_value"),
        ("up", 400, "invalid_value"),
        ("loop.safetensors", 400, "invalid_value"),
        ("pipe.safetensors", 400, "invalid_value"),
        ("two", 400, "invalid_value"),
        (".", 400, "invalid_value"),
        ("", 400, "invalid_value"),
        ("a\0b", 400, "invalid_value"),
        ("x" * 4000, 400, "invalid_value"),
        ("tone/adapter.safetensors/x", 400, "invalid_value"),
        ("not-there.safetensors", 404, "model_not_found"),
        ("bad.safetensors", 400, "adapter_file_invalid"),
    ],
)
def test_other_paths_are_refused(server, path, status, code):
    for route, body in (
        ("load_lora_adapter", {"lora_name": "x", "lora_path": path}),
        ("load_adapter", {"name": "x", "path": path}),
    ):
        answer = post(server, route, **body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code), error
        assert error["param"] == list(body)[1]
    assert names(server) == []


def test_what_lies_elsewhere_does_not_show(server):
    there = post(server, "load_adapter", name="x", path="../secret.safetensors")
    not_there = post(server, "load_adapter", name="x", path="../no-such.safetensors")
    messages = [a.json()["error"]["message"] for a in (there, not_there)]
    assert messages[0].replace("secret", "no-such") == messages[1]


def test_a_file_over_the_cap_is_not_read(in_process, shelf):
    with in_process(adapter_load_dir=shelf, max_adapter_bytes=1024) as server:
        answer = post(server, "load_adapter", name="x", path="mood.safetensors")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (413, "adapter_too_large", "path")


def test_a_folder_swapped_for_a_link_after_the_check_is_not_followed(shelf, monkeypatch):
    from server.adapters import load_dir

    check = load_dir._below

    def swapped(top, target, path, field):
        found = check(top, target, path, field)
        if found.name == "adapter.safetensors":
            (shelf / "tone").rename(shelf / "old")
            (shelf / "tone").symlink_to(shelf.parent)
            (shelf.parent / "adapter.safetensors").write_bytes(b"secret")
        return found

    monkeypatch.setattr(load_dir, "_below", swapped)
    with pytest.raises(load_dir.InvalidRequest, match="path: got"):
        read_below(shelf, "tone/adapter.safetensors", field="path", max_bytes=10**6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_path": "tone"}, "lora_name"),
        ({"lora_name": "no spaces", "lora_path": "tone"}, "lora_name"),
        ({"lora_name": MODEL.name, "lora_path": "tone"}, "lora_name"),
        ({"lora_name": "x", "lora_path": "tone", "is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"lora_name": "x", "lora_path": "tone", "rank": 3}, "rank"),
    ],
)
def test_bad_bodies_name_the_field(server, body, param):
    answer = post(server, "load_lora_adapter", **body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["param"] == param


def test_off_by_default(in_process):
    with in_process() as server:
        answer = post(server, "load_adapter", name="x", path="tone")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "unsupported_parameter",
        "path",
    )
    assert "adapter_load_dir" in error["message"]


@pytest.mark.parametrize(
    "route", ["load_adapter", "unload_adapter", "load_lora_adapter", "unload_lora_adapter"]
)
def test_the_admin_key_is_needed(in_process, shelf, route):
    with in_process(adapter_load_dir=shelf, api_key=API_KEY) as server:
        for headers in ({}, {"Authorization": f"Bearer {API_KEY}"}):
            assert post(server, route, headers, name="x").status_code == 401
    with in_process(adapter_load_dir=shelf, admin_key=None) as server:
        assert post(server, route, name="x").status_code == 401


def test_a_body_over_its_cap(in_process, shelf):
    with in_process(adapter_load_dir=shelf, max_body_bytes=1024) as server:
        answer = post(server, "load_adapter", name="x", path="y" * 3000)
    assert answer.status_code == 413
