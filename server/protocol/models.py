"""Bodies of ``/v1/models`` and of ``/admin/adapters``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from reft_core.sites import ModelDescription
from reft_core.spec import BaseModelSpec
from server.registry import Version


class AdapterCard(BaseModel):
    """What a caller may want to know about an adapter before using it. An extension."""

    version: int
    digest: str
    description: str
    method: str
    positions: str = Field(description="the position rule, such as f7+l7")
    num_parameters: int


class ModelCard(BaseModel):
    """A value that requests may name as their ``model``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "reft-serve"
    root: str
    parent: str | None = Field(description="an adapter's base model")
    max_model_len: int
    reft: AdapterCard | None = Field(None, description="null for the base model")

    @classmethod
    def of_base(cls, model: ModelDescription, created: int, max_model_len: int) -> ModelCard:
        """The base model's card."""
        return cls(
            id=model.name,
            created=created,
            root=model.name,
            parent=None,
            max_model_len=max_model_len,
        )

    @classmethod
    def of_adapter(
        cls, version: Version, model: ModelDescription, max_model_len: int, name: str | None = None
    ) -> ModelCard:
        """An adapter's card, under the ``name`` that was asked for if it is another."""
        spec = version.spec
        return cls(
            id=name or version.name,
            created=version.created_at,
            root=version.reference,
            parent=model.name,
            max_model_len=max_model_len,
            reft=AdapterCard(
                version=version.number,
                digest=version.digest,
                description=spec.description,
                method=spec.method,
                positions=spec.positions.rule,
                num_parameters=spec.num_parameters,
            ),
        )


class ModelList(BaseModel):
    """Everything that can be named."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class VersionCard(BaseModel):
    """One stored version of an adapter."""

    name: str
    version: int
    digest: str
    num_bytes: int
    created_at: int = Field(description="seconds since 1970, UTC")
    num_users: int | None = Field(
        description="requests using it now, whosever they are; null: not in the engine, or the key "
        "is not an operator's"
    )
    tenant: str = Field("", description="whose name it is; empty: shared by all")
    method: str = ""
    base: str = Field("", description="name of the base model in its spec")

    @classmethod
    def of(cls, version: Version, num_users: int | None) -> VersionCard:
        """The card of one version."""
        return cls(
            name=version.name,
            version=version.number,
            digest=version.digest,
            num_bytes=version.num_bytes,
            created_at=version.created_at,
            num_users=num_users,
            tenant=version.tenant,
            method=version.spec.method,
            base=version.spec.base.name,
        )


class UploadAnswer(VersionCard):
    """Answer to an upload: the version that its name now means."""

    created: bool = Field(description="false if these bytes were a version of it already")


class AdapterList(BaseModel):
    """The current version of every adapter."""

    object: Literal["list"] = "list"
    data: list[VersionCard]
    has_more: bool = Field(False, description="whether names come after these")
    base: BaseModelSpec = Field(description="the model served, whose shape adapters must have")


class AdapterDetail(BaseModel):
    """Everything about one adapter."""

    name: str
    tenant: str = ""
    current: int
    previous: int | None = Field(None, description="what a rollback makes current")
    pinned: bool = Field(False, description="whether it was pinned over HTTP")
    versions: list[VersionCard]
    spec: dict[str, Any] = Field(description="spec of the version named, or the current one's")


class DeleteAnswer(BaseModel):
    """Answer to a delete. Requests already running are not disturbed."""

    name: str
    deleted_versions: list[int]


class AuditCard(BaseModel):
    """One change that somebody made."""

    id: int
    at: int = Field(description="seconds since 1970, UTC")
    actor: str = Field(description="the key; empty for the operator's own files and commands")
    tenant: str
    action: str
    name: str
    number: int | None = Field(description="the version")
    digest: str | None
    detail: str


class AuditList(BaseModel):
    """A page of the audit log, newest first."""

    object: Literal["list"] = "list"
    data: list[AuditCard]
    has_more: bool = Field(description="whether there are older entries")
