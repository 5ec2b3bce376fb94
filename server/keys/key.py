"""A key as it is kept, and what may be asked of a new one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from server.registry.versions import TENANT_PATTERN

Kind = Literal["user", "admin"]

_MODEL_PATTERN = re.compile(r"[^\s@?\[\]]{1,256}")
_MAX_RATE = 1_000_000_000

Tenant = Annotated[str, StringConstraints(pattern=TENANT_PATTERN)]


class NewKey(BaseModel):
    """What a new key is for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(
        min_length=1, max_length=96, description="for people: who or what will use the key"
    )
    tenant: Tenant = Field(
        "",
        description="whose adapters it sees beside the shared ones; empty: the shared alone",
    )
    kind: Kind = Field(
        "user",
        description="user: /v1. admin: /admin, of its tenant or, without one, of the whole server",
    )
    models: tuple[str, ...] = Field(
        ("*",),
        strict=False,  # JSON has lists
        min_length=1,
        max_length=64,
        description="names it may use, adapters' and the base model's; * stands for any characters",
    )
    may_upload: bool = Field(
        False, description="a user key may also upload and manage its own tenant's adapters"
    )
    requests_per_minute: int | None = Field(
        None, ge=0, le=_MAX_RATE, description="null: the server's default; 0: no limit"
    )
    tokens_per_minute: int | None = Field(
        None, ge=0, le=_MAX_RATE, description="of prompts and answers; null: default; 0: no limit"
    )
    max_concurrency: int | None = Field(
        None, ge=0, le=_MAX_RATE, description="requests at once; null: default; 0: no limit"
    )
    expires_in_s: int | None = Field(
        None, ge=1, le=_MAX_RATE, description="seconds until it expires; null: never"
    )

    @field_validator("name")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not value.isprintable() or not value.strip():
            raise ValueError("printable characters")
        return value

    @field_validator("models")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            if not _MODEL_PATTERN.fullmatch(pattern):
                raise ValueError(
                    f"{pattern[:40]!r}: names without @version, in which * stands for any "
                    "characters; 1 to 256 characters, none of them a space, ? or a bracket"
                )
        return value


@dataclass(frozen=True)
class Key:
    """A key, without its secret. Times are seconds since 1970, UTC."""

    id: str
    digest: str
    """SHA-256 of the secret, hex."""
    name: str
    tenant: str
    kind: Kind
    models: tuple[str, ...]
    may_upload: bool
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrency: int | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None = None
    last_used_at: int | None = None
    """To within a minute."""

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """Whether it opens anything at ``now``, and if not, why."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and now >= self.expires_at:
            return "expired"
        return "active"
