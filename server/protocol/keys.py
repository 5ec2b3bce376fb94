"""Bodies of ``/admin/keys``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Literal, Self

from pydantic import BaseModel, Field

from server.keys import Key
from server.keys.key import Kind


class KeyCard(BaseModel):
    """A key, without its secret. Times are seconds since 1970, UTC."""

    id: str
    name: str
    tenant: str
    kind: Kind
    state: Literal["active", "expired", "revoked"]
    models: list[str] = Field(description="patterns of names it may use")
    may_upload: bool
    requests_per_minute: int | None = Field(description="null: the server's default; 0: no limit")
    tokens_per_minute: int | None
    max_concurrency: int | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None = Field(description="to within a minute")

    @classmethod
    def of(cls, key: Key, /, **more: str) -> Self:
        """The card of a key."""
        fields = asdict(key)
        del fields["digest"]
        return cls(**fields, state=key.state(time.time()), **more)


class CreatedKey(KeyCard):
    """Answer to a creation."""

    key: str = Field(description="the key itself, which is shown this once")


class KeyList(BaseModel):
    """Keys, oldest first."""

    object: Literal["list"] = "list"
    data: list[KeyCard]
