from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from pydantic import ValidationError
from sqlalchemy import text as sql

from server.database import open_database, reading
from server.keys import KeyStore, NewKey, secret


@pytest.fixture
def store(database_url) -> Iterator[KeyStore]:
    engine = open_database(database_url)
    yield KeyStore(engine)
    engine.dispose()


def test_a_key_is_kept_whole(store):
    wanted = NewKey(
        name="the bot ü",
        tenant="acme",
        models=("support-*", "base"),
        may_upload=True,
        requests_per_minute=5,
        tokens_per_minute=10**9,
        max_concurrency=0,
        expires_in_s=60,
    )
    _, key = store.create(wanted)
    assert store.find(key.id) == key
    assert key.models == ("support-*", "base")
    assert key.expires_at == key.created_at + 60
    assert (key.requests_per_minute, key.max_concurrency) == (5, 0)
    assert store.find("0" * 16) is None


def test_the_database_never_has_the_secret(store, database_url):
    text, key = store.create(NewKey(name="bot"))
    raw = text.split("_")[2]
    engine = open_database(database_url)
    with reading(engine) as connection:
        rows = connection.execute(sql("SELECT * FROM keys")).all()
    engine.dispose()
    assert len(rows) == 1
    assert key.digest in str(rows)
    assert raw not in str(rows)
    assert secret.is_right(secret.parse(text), key.digest)


def test_lists_are_of_one_tenant_or_of_all(store):
    made = [store.create(NewKey(name="n", tenant=tenant))[1] for tenant in ("a", "b", "", "a")]
    assert {key.id for key in store.all("a")} == {made[0].id, made[3].id}
    assert {key.id for key in store.all("")} == {made[2].id}
    assert len(store.all()) == 4
    assert store.all("c") == []


def test_a_revoked_key_stays_revoked_and_known(store):
    _, key = store.create(NewKey(name="n", tenant="a"))
    assert key.state(time.time()) == "active"
    assert store.revoke(key.id, "b") is None
    assert store.find(key.id).state(time.time()) == "active"
    revoked = store.revoke(key.id, "a")
    assert revoked.state(time.time()) == "revoked"
    assert store.revoke(key.id) == revoked
    assert store.revoke("0" * 16) is None
    assert store.all() == [revoked]


def test_states_by_time(store):
    _, key = store.create(NewKey(name="n", expires_in_s=10))
    assert key.state(key.created_at + 9.9) == "active"
    assert key.state(key.created_at + 10) == "expired"


def test_whether_there_are_keys(store):
    assert not store.any_ever()
    _, admin = store.create(NewKey(name="n", kind="admin"))
    assert store.any_ever()
    assert not store.any_ever("user")
    assert store.any_active()
    store.revoke(admin.id)
    assert store.any_ever("admin")
    assert not store.any_active()


def test_an_expired_key_is_not_active(store, monkeypatch):
    store.create(NewKey(name="n", expires_in_s=1))
    assert store.any_active()
    now = time.time()
    monkeypatch.setattr("server.keys.store.time.time", lambda: now + 2)
    assert not store.any_active()


def test_use_is_noted(store):
    _, key = store.create(NewKey(name="n"))
    store.touch(key.id, 1234567890.9)
    assert store.find(key.id).last_used_at == 1234567890


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", " "),
        ("name", "a\nb"),
        ("name", "x" * 97),
        ("tenant", "-a"),
        ("tenant", "a/b"),
        ("tenant", "a" * 97),
        ("kind", "root"),
        ("models", ()),
        ("models", ("a@1",)),
        ("models", ("[ab]",)),
        ("models", ("a b",)),
        ("models", ("?",)),
        ("requests_per_minute", -1),
        ("tokens_per_minute", 10**10),
        ("expires_in_s", 0),
        ("scopes", "all"),
    ],
)
def test_what_no_key_may_be(field, value):
    NewKey(name="good")
    with pytest.raises(ValidationError, match=field):
        NewKey(**{"name": "good", field: value})
