"""The door: which key a request presents, and whom that makes it.

A row is read once in a while and not with every request: for ``cache_s`` seconds a key is what
it was, so a revocation takes effect within that time in every process.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from dataclasses import astuple, dataclass, replace
from typing import Literal

import structlog
from fastapi import HTTPException
from pydantic import SecretStr

from reft_core.errors import DatabaseUnavailable, InvalidRequest
from server.keys import secret
from server.keys.buckets import Clock
from server.keys.key import Key
from server.keys.principal import ANYONE, Limits, Principal
from server.keys.store import KeyStore
from server.settings import Settings, is_loopback

log = structlog.get_logger(__name__)

Need = Literal["user", "admin", "adapters", "operator", "any"]
"""What a route asks of whoever calls it: a user key, an admin key, one that manages adapters,
an operator's, or any key at all."""

_EXPECTED: dict[Need, str] = {
    "user": "a user key of this server",
    "admin": "an admin key of this server",
    "adapters": "an admin key of this server, or a user key with may_upload",
    "operator": "an admin key of no tenant",
    "any": "any key of this server",
}
_MAX_CACHED = 8192
_TOUCH_AFTER_S = 60.0
_SCHEME = "bearer "


@dataclass(frozen=True)
class _Read:
    """A row as it was at a time of the door's clock."""

    key: Key
    at: float


class Door:
    """Tells who calls. Belongs to the event loop; reads the table in threads."""

    def __init__(self, settings: Settings, store: KeyStore, clock: Clock = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._cache_s = settings.key_cache_s
        self._defaults = Limits(
            settings.key_requests_per_minute,
            settings.key_tokens_per_minute,
            settings.key_max_concurrency,
        )
        self._static: list[tuple[SecretStr, Principal]] = []
        if settings.api_key is not None:
            name = "REFT_API_KEY"
            user = Principal("static-user", name, kind="user", limits=self._defaults)
            self._static.append((settings.api_key, user))
        if settings.admin_key is not None:
            name = "REFT_ADMIN_KEY"
            admin = Principal("static-admin", name, kind="admin", limits=self._defaults)
            self._static.append((settings.admin_key, admin))
        # Off loopback the API is never open, whatever becomes of the keys.
        self._needs_key = (
            settings.api_key is not None or settings.require_keys or not is_loopback(settings.host)
        )
        self._looked_at = float("-inf")
        self._read: OrderedDict[str, _Read] = OrderedDict()
        self._reading: dict[str, asyncio.Task[Key | None]] = {}
        self._touching: set[asyncio.Task[None]] = set()

    async def admit(self, authorization: str, need: Need) -> Principal:
        """Whom the header makes the request. Where no key is needed, :data:`ANYONE`.

        Raises 401 without a valid key of the kind that is needed, and
        :class:`PermissionDenied` for an admin key of one tenant where an operator's is needed.
        """
        principal = await self.identify(authorization)
        if principal is not None and _fits(principal, need):
            return principal
        if need in ("user", "any") and not await self.is_closed():
            return ANYONE  # clients of an open server send whatever they like
        if principal is not None and need == "operator" and principal.kind == "admin":
            principal.check_is_operator()
        if principal is not None:
            raise unauthorised(f"got a key of kind {principal.kind!r}, expected {_EXPECTED[need]}")
        given = _bearer(authorization)
        raise unauthorised(
            f"{'missing' if given is None else 'wrong'} key, expected 'Bearer <key>' with "
            f"{_EXPECTED[need]}"
        )

    async def identify(self, authorization: str) -> Principal | None:
        """Whose key the header holds, None if it holds none.

        Raises 401 for a key that has expired or was revoked.
        """
        text = _bearer(authorization)
        if text is None:
            return None
        return self._static_principal(text) or await self._stored_principal(text)

    async def shows_all(self, authorization: str) -> bool:
        """Whether what belongs to every tenant may be shown: to an operator, or where no key is
        needed, as whoever can see one thing there can see all."""
        principal = await self.identify(authorization)
        if principal is not None and principal.is_operator:
            return True
        return not await self.is_closed()

    async def is_closed(self) -> bool:
        """Whether ``/v1`` needs a key: once there has been a user key it does for good."""
        if not self._needs_key and self._clock() - self._looked_at >= self._cache_s:
            self._needs_key = await asyncio.to_thread(self._store.any_ever, "user")
            self._looked_at = self._clock()
        return self._needs_key

    def forget(self, key_id: str) -> None:
        """Read a key anew, since it was made or changed here."""
        self._read.pop(key_id, None)
        self._looked_at = float("-inf")

    def _static_principal(self, text: str) -> Principal | None:
        """Whom a key of the settings makes the request. Compares with each, always."""
        given = text.encode("utf-8", "surrogateescape")
        found = None
        for key, principal in self._static:
            if hmac.compare_digest(given, key.get_secret_value().encode()):
                found = principal
        return found

    async def _stored_principal(self, text: str) -> Principal | None:
        """Whom a key of the table makes the request."""
        presented = secret.parse(text)
        if presented is None:
            return None
        key = await self._find(presented.id)
        if not secret.is_right(presented, None if key is None else key.digest):
            return None
        assert key is not None, "only a stored secret is right"
        now = time.time()
        if (state := key.state(now)) != "active":
            raise unauthorised(f"the key {key.id} is {state}")
        self._note_use(key, now)
        return self._principal_of(key)

    async def _find(self, key_id: str) -> Key | None:
        """The key as it was at most ``cache_s`` seconds ago. Requests that miss read it once.

        Ids that nobody has are not kept, or whoever tries many would push out those in use.
        """
        held = self._read.get(key_id)
        if held is not None and self._clock() - held.at < self._cache_s:
            return held.key
        task = self._reading.get(key_id)
        if task is None:
            task = asyncio.create_task(self._refresh(key_id))
            self._reading[key_id] = task
            task.add_done_callback(lambda _: self._reading.pop(key_id, None))
        return await asyncio.shield(task)  # others may wait for it when this client goes

    async def _refresh(self, key_id: str) -> Key | None:
        began_at = self._clock()
        key = await asyncio.to_thread(self._store.find, key_id)
        self._read.pop(key_id, None)
        if key is not None:
            self._read[key_id] = _Read(key, began_at)
            if len(self._read) > _MAX_CACHED:
                self._read.popitem(last=False)
        return key

    def _note_use(self, key: Key, now: float) -> None:
        """Record that a key is used, once a minute, beside the request."""
        if now - (key.last_used_at or 0) < _TOUCH_AFTER_S:
            return
        held = self._read.get(key.id)
        if held is not None:
            self._read[key.id] = replace(held, key=replace(held.key, last_used_at=int(now)))
        task = asyncio.create_task(self._touch(key.id, now))
        self._touching.add(task)
        task.add_done_callback(self._touching.discard)

    async def _touch(self, key_id: str, now: float) -> None:
        try:
            await asyncio.to_thread(self._store.touch, key_id, now)
        except DatabaseUnavailable as error:  # of no consequence to the request
            log.warning("the use of a key could not be recorded", key=key_id, error=str(error))

    def _principal_of(self, key: Key) -> Principal:
        """The principal of a key, with the server's defaults where it has no limits of its own."""
        own = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrency)
        given = zip(own, astuple(self._defaults), strict=True)
        limits = Limits(*(default if value is None else value for value, default in given))
        return Principal(key.id, key.name, key.tenant, key.kind, key.models, key.may_upload, limits)


def check_exposure(settings: Settings, store: KeyStore) -> None:
    """Raise :class:`InvalidRequest` if others than this machine would reach a server without keys.

    Such a server would be of no use to anybody but those who should not use it.
    """
    if is_loopback(settings.host) or settings.api_key is not None or settings.admin_key is not None:
        return
    if not store.any_active():
        raise InvalidRequest.because(
            "host",
            settings.host,
            "a loopback address such as 127.0.0.1 while there is no key; make one with "
            "'reft key create', or set REFT_API_KEY",
        )


def unauthorised(problem: str) -> HTTPException:
    """The 401 for ``problem``."""
    return HTTPException(401, f"authorization: {problem}", headers={"WWW-Authenticate": "Bearer"})


def _bearer(authorization: str) -> str | None:
    """The key in a header, None if it is of another scheme."""
    if not authorization.lower().startswith(_SCHEME):
        return None
    return authorization[len(_SCHEME) :].strip()


def _fits(principal: Principal, need: Need) -> bool:
    """Whether a key is of the kind that is needed."""
    if need == "operator":
        return principal.is_operator
    if need == "adapters":
        return principal.manages_adapters
    return need == "any" or principal.kind == need
