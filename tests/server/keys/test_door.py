from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import HTTPException

from reft_core.errors import DatabaseUnavailable, InvalidRequest, PermissionDenied
from server.database import open_database, sqlite_url
from server.keys import ANYONE, Door, Key, KeyStore, Limits, NewKey, secret
from server.keys import door as door_module
from server.keys.door import check_exposure
from server.settings import Settings
from tests.server.keys.test_rates import Clock

STATIC_USER, STATIC_ADMIN = "static-user-key", "static-admin-key-of-16"
PUBLIC = "0.0.0.0"


class CountingStore(KeyStore):
    """A store that counts how often it is asked, and fails when it is told to."""

    num_finds = num_touches = 0
    fails: frozenset[str] = frozenset()

    def find(self, key_id: str) -> Key | None:
        self.num_finds += 1
        if "find" in self.fails:
            raise DatabaseUnavailable("the database does not answer")
        return super().find(key_id)

    def touch(self, key_id: str, now: float) -> None:
        self.num_touches += 1
        if "touch" in self.fails:
            raise DatabaseUnavailable("the database does not answer")
        super().touch(key_id, now)


@pytest.fixture
def store(tmp_path) -> Iterator[CountingStore]:
    engine = open_database(sqlite_url(tmp_path / "keys.sqlite"))
    yield CountingStore(engine)
    engine.dispose()


def door_on(store: KeyStore, clock: Clock | None = None, **settings: Any) -> Door:
    return Door(Settings(**settings), store, clock or Clock())


def bearer(key: str) -> str:
    return f"Bearer {key}"


def admit(door: Door, authorization: str, need: str = "user"):
    return asyncio.run(_admit(door, authorization, need))


async def _admit(door: Door, authorization: str, need: str = "user"):
    try:
        return await door.admit(authorization, need)
    finally:
        await asyncio.gather(*door._touching)


def refused(door: Door, authorization: str, need: str = "user") -> str:
    with pytest.raises(HTTPException) as caught:
        admit(door, authorization, need)
    assert caught.value.status_code == 401
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    return str(caught.value.detail)


def test_a_key_of_the_table_is_who_it_says(store):
    text, key = store.create(
        NewKey(name="bot", tenant="acme", models=("a*",), may_upload=True, max_concurrency=3)
    )
    door = door_on(store, key_requests_per_minute=7, key_tokens_per_minute=0)
    principal = admit(door, bearer(text))
    assert (principal.id, principal.name, principal.tenant) == (key.id, "bot", "acme")
    assert (principal.kind, principal.models, principal.may_upload) == ("user", ("a*",), True)
    assert principal.limits == Limits(7, 0, 3)
    assert admit(door, f"bearer   {text} ") == principal


def test_a_wrong_secret_opens_nothing(store):
    text, key = store.create(NewKey(name="bot"))
    other, _ = store.create(NewKey(name="other"))
    door = door_on(store)
    mixed = f"reft_{key.id}_{other.split('_')[2]}"
    for wrong in (mixed, secret.generate()[0], "", "x", key.id, text.split("_")[2]):
        assert "wrong key" in refused(door, bearer(wrong))
    for scheme in (text, f"Basic {text}", f"Token {text}", ""):
        assert "missing key" in refused(door, scheme)
    assert admit(door, bearer(text)).id == key.id


def test_refusals_never_repeat_a_key(store):
    text, _ = store.create(NewKey(name="bot", kind="admin"))
    door = door_on(store, api_key=STATIC_USER)
    for key in (text, text[:-1]):
        assert key not in refused(door, bearer(key))


@pytest.mark.parametrize(
    ("need", "opens"),
    [
        ("user", {"user", "uploader"}),
        ("admin", {"admin", "tenant admin"}),
        ("adapters", {"admin", "tenant admin", "uploader"}),
        ("operator", {"admin"}),
        ("any", {"user", "uploader", "admin", "tenant admin"}),
    ],
)
def test_which_key_opens_what(store, need, opens):
    keys = {
        "user": store.create(NewKey(name="u", tenant="acme"))[0],
        "uploader": store.create(NewKey(name="u", tenant="acme", may_upload=True))[0],
        "admin": store.create(NewKey(name="a", kind="admin"))[0],
        "tenant admin": store.create(NewKey(name="a", kind="admin", tenant="acme"))[0],
    }
    door = door_on(store)
    found = set()
    for name, text in keys.items():
        try:
            admit(door, bearer(text), need)
            found.add(name)
        except (HTTPException, PermissionDenied):
            pass
    assert found == opens


def test_static_keys_belong_to_no_tenant(store):
    door = door_on(store, api_key=STATIC_USER, admin_key=STATIC_ADMIN)
    user, admin = admit(door, bearer(STATIC_USER)), admit(door, bearer(STATIC_ADMIN), "operator")
    assert (user.kind, user.tenant, user.models) == ("user", "", ("*",))
    assert (admin.kind, admin.tenant) == ("admin", "")
    refused(door, bearer(STATIC_ADMIN))
    refused(door, bearer(STATIC_USER), "admin")
    refused(door, bearer(STATIC_USER[:-1]))
    assert store.num_finds == 0, "they need no database"


def test_static_keys_are_all_compared_in_constant_time(store, monkeypatch):
    compared = []

    def spy(a, b):
        compared.append(b)
        return original(a, b)

    original = door_module.hmac.compare_digest
    monkeypatch.setattr(door_module.hmac, "compare_digest", spy)
    door = door_on(store, api_key=STATIC_USER, admin_key=STATIC_ADMIN)
    for key, need in ((STATIC_USER, "user"), (STATIC_ADMIN, "admin")):
        compared.clear()
        admit(door, bearer(key), need)
        assert compared == [STATIC_USER.encode(), STATIC_ADMIN.encode()]


def test_a_revocation_takes_effect_within_the_time_a_key_is_cached(store):
    clock = Clock()
    door = door_on(store, clock, key_cache_s=5)
    text, key = store.create(NewKey(name="bot"))
    for _ in range(10):
        admit(door, bearer(text))
    assert store.num_finds == 1
    store.revoke(key.id)
    clock.now += 4.9
    admit(door, bearer(text))
    clock.now += 0.1
    assert "revoked" in refused(door, bearer(text))


def test_a_revocation_made_here_takes_effect_at_once(store):
    door = door_on(store)
    text, key = store.create(NewKey(name="bot"))
    admit(door, bearer(text))
    store.revoke(key.id)
    door.forget(key.id)
    assert "revoked" in refused(door, bearer(text))


def test_a_key_expires_also_while_it_is_cached(store, monkeypatch):
    text, key = store.create(NewKey(name="bot", expires_in_s=60))
    door = door_on(store)
    admit(door, bearer(text))
    monkeypatch.setattr("server.keys.door.time.time", lambda: key.expires_at)
    assert "expired" in refused(door, bearer(text))
    assert store.num_finds == 1


def test_a_wrong_secret_is_not_told_that_the_key_is_revoked(store):
    _, key = store.create(NewKey(name="bot"))
    store.revoke(key.id)
    guess = f"reft_{key.id}_{'0' * 64}"
    assert "revoked" not in refused(door_on(store), bearer(guess))


def test_requests_that_come_together_read_a_key_once(store):
    text, _ = store.create(NewKey(name="bot"))
    door = door_on(store)

    async def together() -> None:
        await asyncio.gather(*(door.admit(bearer(text), "user") for _ in range(20)))
        await asyncio.gather(*door._touching)

    asyncio.run(together())
    assert store.num_finds == 1


def test_keys_that_nobody_has_do_not_push_out_those_in_use(store, monkeypatch):
    monkeypatch.setattr(door_module, "_MAX_CACHED", 1)
    text, _ = store.create(NewKey(name="bot"))
    door = door_on(store)
    admit(door, bearer(text))
    for _ in range(3):
        refused(door, bearer(secret.generate()[0]))
    finds = store.num_finds
    admit(door, bearer(text))
    assert store.num_finds == finds


def test_use_is_noted_once_a_minute(store, monkeypatch):
    text, key = store.create(NewKey(name="bot"))
    door = door_on(store)
    for _ in range(5):
        admit(door, bearer(text))
    assert store.num_touches == 1
    noted = store.find(key.id).last_used_at
    assert noted is not None
    monkeypatch.setattr("server.keys.door.time.time", lambda: noted + 61.0)
    admit(door, bearer(text))
    assert store.find(key.id).last_used_at == noted + 61


def test_without_its_database_the_door_stays_shut_but_a_note_may_fail(store, caplog):
    text, _ = store.create(NewKey(name="bot"))
    door = door_on(store, key_cache_s=0)
    store.fails = frozenset({"find"})
    with pytest.raises(DatabaseUnavailable):
        admit(door, bearer(text))
    store.fails = frozenset({"touch"})
    with caplog.at_level(logging.WARNING):
        assert admit(door, bearer(text)).name == "bot"
    assert "could not be recorded" in caplog.text


# Open and closed ----------------------------------------------------------------------------


def test_on_loopback_no_key_is_needed_until_there_is_a_user_key(store):
    clock = Clock()
    door = door_on(store, clock, admin_key=STATIC_ADMIN, key_cache_s=5)
    for authorization in ("", "Bearer whatever", f"Bearer {STATIC_ADMIN}"):
        assert admit(door, authorization) is ANYONE
    refused(door, "", "admin")
    store.create(NewKey(name="root", kind="admin"))
    clock.now += 5
    assert admit(door, "") is ANYONE
    _, user = store.create(NewKey(name="bot"))
    assert admit(door, "") is ANYONE, "not noticed yet"
    clock.now += 5
    refused(door, "")
    store.revoke(user.id)
    clock.now += 5
    refused(door, "")


@pytest.mark.parametrize(
    "settings", [{"host": PUBLIC}, {"require_keys": True}, {"api_key": STATIC_USER}]
)
def test_elsewhere_a_key_is_needed_from_the_start(store, settings):
    door = door_on(store, **settings)
    refused(door, "")
    refused(door, "", "any")


def test_only_an_operator_is_shown_all_where_keys_are_needed(store):
    operator, _ = store.create(NewKey(name="root", kind="admin"))
    tenants, _ = store.create(NewKey(name="root", kind="admin", tenant="acme"))
    user, _ = store.create(NewKey(name="bot"))
    door = door_on(store)

    async def shown(key: str) -> bool:
        found = await door.shows_all(bearer(key))
        await asyncio.gather(*door._touching)
        return found

    assert [asyncio.run(shown(key)) for key in (operator, tenants, user, "x")] == [
        True,
        False,
        False,
        False,
    ]


def test_a_public_address_without_any_key_is_refused(store):
    with pytest.raises(InvalidRequest, match="REFT_API_KEY"):
        check_exposure(Settings(host=PUBLIC), store)
    check_exposure(Settings(), store)
    check_exposure(Settings(host=PUBLIC, api_key=STATIC_USER), store)
    check_exposure(Settings(host=PUBLIC, admin_key=STATIC_ADMIN), store)
    _, key = store.create(NewKey(name="bot"))
    check_exposure(Settings(host=PUBLIC), store)
    store.revoke(key.id)
    with pytest.raises(InvalidRequest, match="reft key create"):
        check_exposure(Settings(host=PUBLIC), store)
