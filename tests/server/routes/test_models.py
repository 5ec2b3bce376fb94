from __future__ import annotations

import pytest

from tests.server.conftest import ADMIN
from tests.server.fakes import MODEL, make_adapter


def test_the_base_model_and_adapters_are_listed(server):
    digest = server.upload("tone", make_adapter(1, description="polite"))["digest"]
    listed = server.http.get("/v1/models").json()
    assert listed["object"] == "list"
    base, tone = listed["data"]
    assert (base["id"], base["root"], base["parent"]) == (MODEL.name, MODEL.name, None)
    assert base["reft"] is None
    assert base["max_model_len"] == 256
    assert (tone["id"], tone["parent"]) == ("tone", MODEL.name)
    assert tone["root"] == f"tone@sha256:{digest[:12]}"
    assert tone["reft"] == {
        "version": 1,
        "digest": digest,
        "description": "polite",
        "method": "direft",
        "positions": "l2",
        "num_parameters": 2 * (8 * 2 + 2 * 8 + 2),
    }


def test_one_model_is_found_by_any_form_of_its_name(server):
    server.upload("tone", make_adapter(1))
    server.upload("tone", make_adapter(2))
    assert server.http.get(f"/v1/models/{MODEL.name}").json()["id"] == MODEL.name
    assert server.http.get("/v1/models/tone").json()["reft"]["version"] == 2
    old = server.http.get("/v1/models/tone@1").json()
    assert (old["id"], old["reft"]["version"]) == ("tone@1", 1)


def test_an_unknown_model_names_those_there_are(server):
    server.upload("tone", make_adapter(1))
    for path in ("/v1/models/nope", "/v1/models/nope/deeper"):
        answer = server.http.get(path)
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "tone" in error["message"]
        assert MODEL.name in error["message"]


@pytest.mark.parametrize(
    ("path", "key", "first"), [("/v1/models", "id", [MODEL.name]), ("/admin/adapters", "name", [])]
)
def test_a_long_list_comes_in_pages(server, path, key, first):
    for name in ("c", "a", "d", "b"):
        server.upload(name, make_adapter(1))
    server.http.delete("/admin/adapters/d", headers=ADMIN)

    def names(**page) -> list[str]:
        answer = server.http.get(path, params=page, headers=ADMIN)
        assert answer.headers["content-type"] == "application/json"
        return [card[key] for card in answer.json()["data"]]

    assert names() == [*first, "a", "b", "c"]
    assert names(limit=2) == [*first, "a", "b"]
    assert names(limit=2, after="a") == ["b", "c"]
    assert names(after="c") == []
    assert server.http.get(path, params={"limit": 0}, headers=ADMIN).status_code == 400
