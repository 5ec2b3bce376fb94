"""Who makes a request, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from reft_core.errors import PermissionDenied, explain
from server.keys.key import Kind


@dataclass(frozen=True)
class Limits:
    """How much one key may ask for; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrency: int = 0


@dataclass(frozen=True)
class Principal:
    """Who makes a request."""

    id: str
    """The key's; empty where no key is needed."""
    name: str
    tenant: str = ""
    """Whose adapters it sees beside the shared ones, and the salt of its prefix cache."""
    kind: Kind = "user"
    models: tuple[str, ...] = ("*",)
    may_upload: bool = False
    limits: Limits = Limits()

    @property
    def is_operator(self) -> bool:
        """Whether it may see and change what belongs to every tenant."""
        return self.kind == "admin" and not self.tenant

    @property
    def manages_adapters(self) -> bool:
        """Whether it may upload and manage adapters, of its own tenant at least."""
        return self.kind == "admin" or self.may_upload

    @property
    def actor(self) -> str:
        """What an audit log calls it."""
        return f"{self.name} ({self.id})" if self.id else self.name

    @property
    def may_use_all(self) -> bool:
        """Whether its scope leaves nothing out."""
        return "*" in self.models

    def may_use(self, name: str) -> bool:
        """Whether its scope includes the model ``name`` (without a version)."""
        return any(fnmatchcase(name, pattern) for pattern in self.models)

    def check_may_use(self, name: str) -> None:
        """Raise :class:`PermissionDenied` unless :meth:`may_use`."""
        if not self.may_use(name):
            allowed = f"one that this key's scope includes: {', '.join(self.models)}"
            raise PermissionDenied(explain("model", name, allowed), field="model")

    def check_may_bring(self, field: str) -> None:
        """Raise :class:`PermissionDenied`, about ``field``, unless every model is in its scope:
        an adapter that a request brings has no name that a narrower one could hold."""
        if not self.may_use_all:
            allowed = f"no inline adapter, as this key's scope is {', '.join(self.models)}"
            raise PermissionDenied(explain(field, "an adapter", allowed), field=field)

    def check_may_grant(self, models: tuple[str, ...]) -> None:
        """Raise :class:`PermissionDenied` unless a scope of these patterns is within its own."""
        for pattern in models:
            # A star is matched by a star alone, so what a pattern matches holds for all it means.
            if not self.may_use(pattern):
                allowed = f"patterns within this key's scope: {', '.join(self.models)}"
                raise PermissionDenied(explain("models", pattern, allowed), field="models")

    def check_is_operator(self) -> None:
        """Raise :class:`PermissionDenied` unless :attr:`is_operator`."""
        if not self.is_operator:
            of = f"of tenant {self.tenant!r}" if self.tenant else "of no tenant"
            raise PermissionDenied(
                f"authorization: got a key of kind {self.kind} {of}, expected an admin key of no "
                "tenant"
            )

    def acting_for(self, tenant: str | None) -> str:
        """The tenant that it acts for if it asks for ``tenant``; None means its own.

        Raises :class:`PermissionDenied`: only an operator may act for another.
        """
        if tenant is None or tenant == self.tenant:
            return self.tenant
        if not self.is_operator:
            allowed = f"{self.tenant!r}, the tenant of this key"
            raise PermissionDenied(explain("tenant", tenant, allowed), field="tenant")
        return tenant


ANYONE = Principal(id="", name="anyone")
"""Who calls where no key is needed."""
