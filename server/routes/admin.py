"""``/admin/adapters``: upload, list, inspect and delete adapters."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import Header, HTTPException, Query, Request, Response

from reft_core.spec import DIGEST_PATTERN
from server.http.body import stream_capped
from server.protocol.models import (
    AdapterDetail,
    AdapterList,
    DeleteAnswer,
    UploadAnswer,
    VersionCard,
)
from server.registry import Deleted, Filter
from server.registry.signing import MAX_SIGNATURE_CHARS
from server.registry.versions import TENANT_PATTERN
from server.routes.acting import AnyTenant, Tenant, actor_of, users_of
from server.routes.guards import AdaptersRoute, make_router
from server.routes.listing import NO_NUL, After, Limit, answer_from_thread
from server.services import Services, services_of

router = make_router(AdaptersRoute, tag="admin")

_BINARY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "An adapter file, as it is on disk",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_Words = Annotated[str | None, Query(max_length=256, pattern=NO_NUL)]
_AfterTenant = Annotated[
    str | None,
    Query(pattern=TENANT_PATTERN, description="with `after`: whose name that was, if several are"),
]
_ExpectedDigest = Annotated[
    str | None,
    Header(
        alias="X-Expected-SHA256",
        pattern=DIGEST_PATTERN,
        description="refuse a body that has another SHA-256",
    ),
]

_Signature = Annotated[
    str | None,
    Header(
        alias="X-Model-Signature",
        max_length=MAX_SIGNATURE_CHARS,
        description="the file's detached signature by OpenSSF model-signing, in base64",
    ),
]


@router.post(
    "/admin/adapters/{name}",
    status_code=201,
    openapi_extra=_BINARY_BODY,
    responses={200: {"model": UploadAnswer, "description": "These bytes were known already"}},
)
async def upload_adapter(
    name: str,
    request: Request,
    response: Response,
    tenant: Tenant,
    expected: _ExpectedDigest = None,
    signature: _Signature = None,
) -> UploadAnswer:
    """Store the adapter file in the body and make it what ``name`` means.

    The same bytes again are no error and no new version. Other bytes become the next
    version; requests already running keep the version they started with.
    """
    services = services_of(request)
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise HTTPException(
            415, "content-type: got a form, expected the file's bytes as the body itself"
        )
    max_bytes, timeout_s = services.settings.max_adapter_bytes, services.settings.upload_timeout_s
    with services.registry.incoming() as file:
        async for part in stream_capped(request, max_bytes, timeout_s):
            await asyncio.to_thread(file.write, part)
        await asyncio.to_thread(services.registry.check_signature, file, signature)
        upload = partial(services.registry.upload_file, name, file, expected_digest=expected)
        uploaded = await asyncio.to_thread(upload, tenant=tenant, actor=actor_of(request))
    if not uploaded.created:
        response.status_code = 200
    await services.pins.refresh()
    version = uploaded.version
    users = users_of(request, version.digest)
    return UploadAnswer(**VersionCard.of(version, users).model_dump(), created=uploaded.created)


@router.get("/admin/adapters", response_model=AdapterList)
async def list_adapters(
    request: Request,
    tenant: AnyTenant,
    after: After = "",
    after_tenant: _AfterTenant = None,
    limit: Limit = None,
    prefix: Annotated[str, Query(max_length=256, pattern=NO_NUL)] = "",
    method: _Words = None,
    base: _Words = None,
) -> Response:
    """The current version of every adapter, by name and then tenant."""
    services = services_of(request)
    admit = Filter(prefix, method, base, tenant)
    more = None if limit is None else limit + 1
    found = await asyncio.to_thread(services.registry.page, admit, after, after_tenant, more)
    versions = found[:limit]
    users = [users_of(request, version.digest) for version in versions]

    def build() -> AdapterList:
        cards = map(VersionCard.of, versions, users)
        return AdapterList(
            data=list(cards),
            has_more=len(found) > len(versions),
            base=services.engine.model.to_base_spec(),
        )

    return await answer_from_thread(build)


@router.get("/admin/adapters/{name}")
async def get_adapter(name: str, request: Request, tenant: Tenant) -> AdapterDetail:
    """All versions of one adapter, and the spec of the one that is named: `name`, `name@3`."""
    services = services_of(request)
    found = await asyncio.to_thread(services.registry.inspect, name, tenant)
    return AdapterDetail(
        name=found.version.name,
        tenant=found.version.tenant,
        current=found.current,
        previous=found.previous,
        pinned=found.pinned,
        versions=[
            VersionCard.of(version, users_of(request, version.digest)) for version in found.versions
        ],
        spec=found.version.spec.model_dump(mode="json"),
    )


@router.delete("/admin/adapters/{name}")
async def delete_adapter(name: str, request: Request, tenant: Tenant) -> DeleteAnswer:
    """Delete an adapter with all its versions. Requests that use it finish undisturbed."""
    services = services_of(request)
    delete = partial(services.registry.delete, name, tenant=tenant, actor=actor_of(request))
    deleted = await asyncio.to_thread(delete)
    services.metrics.adapters.forget(name, tenant)
    return await answer_delete(services, name, deleted)


async def answer_delete(services: Services, name: str, deleted: Deleted) -> DeleteAnswer:
    """The answer to a delete, once memory holds nothing for it but what requests use."""
    await services.pins.refresh()
    for digest in deleted.orphaned:
        services.residency.forget(digest)
    return DeleteAnswer(
        name=name, deleted_versions=[version.number for version in deleted.versions]
    )
