"""``/v1/load_adapter`` and its kin: adapters from a folder of the operator's, by name and path.

For tools that manage vLLM's LoRA adapters, which post to ``/v1/load_lora_adapter`` and read a
line of text. What is loaded is uploaded to the registry, and what is unloaded deleted from it;
the folder stays as it is. All need an operator's key.
"""

from __future__ import annotations

import asyncio

from fastapi import Request
from fastapi.responses import PlainTextResponse
from starlette.types import Scope

from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    AdapterNotFound,
    InvalidRequest,
    PermissionDenied,
    ReftError,
    UnsupportedFeature,
)
from server.adapters.load_dir import read_below
from server.keys import Principal
from server.protocol.loading import (
    LoadLoraRequest,
    LoadRequest,
    UnloadLoraRequest,
    UnloadRequest,
)
from server.protocol.models import DeleteAnswer, UploadAnswer, VersionCard
from server.registry.registry import Uploaded
from server.routes.acting import Tenant, actor_of, users_of
from server.routes.admin import delete_adapter
from server.routes.guards import AdminRoute, caller_of, make_router
from server.services import services_of


class LoadingRoute(AdminRoute):
    """A route of the operator's alone: the folder may hold what is meant for other tenants."""

    def check(self, principal: Principal, scope: Scope) -> None:
        """Refuse a tenant's admin key."""
        principal.check_is_operator()


router = make_router(LoadingRoute, tag="admin")


@router.post("/v1/load_adapter")
async def load_adapter(body: LoadRequest, request: Request, tenant: Tenant) -> UploadAnswer:
    """Make a file below the server's ``adapter_load_dir`` what ``name`` means.

    The same bytes again are no error and no new version.
    """
    uploaded = await _load(request, tenant, body.name, body.path, field="path")
    users = users_of(request, uploaded.version.digest)
    card = VersionCard.of(uploaded.version, users)
    return UploadAnswer(**card.model_dump(), created=uploaded.created)


@router.post("/v1/unload_adapter")
async def unload_adapter(body: UnloadRequest, request: Request, tenant: Tenant) -> DeleteAnswer:
    """Delete ``name`` with all its versions. Requests that use it finish undisturbed."""
    return await _unload(request, tenant, body.name, field="name")


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraRequest, request: Request, tenant: Tenant) -> str:
    """The same as ``/v1/load_adapter``, in vLLM's manner: a name that is taken is an error,
    unless ``load_inplace`` is true.
    """
    if not body.load_inplace and await _is_known(request, tenant, body.lora_name):
        raise InvalidRequest(
            f"lora_name: the lora adapter '{body.lora_name}' has already been loaded; expected "
            "another name, or load_inplace true to replace it",
            field="lora_name",
        )
    name, path = body.lora_name, body.lora_path
    await _load(request, tenant, name, path, field="lora_path", named="lora_name")
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraRequest, request: Request, tenant: Tenant) -> str:
    """The same as ``/v1/unload_adapter``, in vLLM's manner."""
    await _unload(request, tenant, body.lora_name, field="lora_name")
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


async def _load(
    request: Request, tenant: str, name: str, path: str, *, field: str, named: str = "name"
) -> Uploaded:
    """Upload the file at ``path``; errors name the body's own fields."""
    services, actor = services_of(request), actor_of(request)
    _check_scope(request, name, field=named)
    root = services.settings.adapter_load_dir
    if root is None:
        raise UnsupportedFeature(
            f"{field}: this server loads no files; expected adapter_load_dir among its settings",
            field=field,
        )
    most = services.settings.max_adapter_bytes

    def upload() -> Uploaded:
        data = read_below(root, path, field=field, max_bytes=most)
        return services.registry.upload(name, data, tenant=tenant, actor=actor)

    try:
        uploaded = await asyncio.to_thread(upload)
    except (AdapterFileInvalid, AdapterMismatch) as error:  # about a field of the file
        if error.field == field:
            raise
        raise error.within(field) from error
    except ReftError as error:
        raise _renamed(error, {"name": named}) from error
    await services.pins.refresh()
    return uploaded


async def _unload(request: Request, tenant: str, name: str, *, field: str) -> DeleteAnswer:
    """Delete an adapter; errors name the body's own field."""
    _check_scope(request, name, field=field)
    try:
        return await delete_adapter(name, request, tenant)
    except ReftError as error:
        raise _renamed(error, {"model": field, "name": field}) from error


def _check_scope(request: Request, name: str, *, field: str) -> None:
    """Refuse an adapter's name that is not in the key's scope."""
    try:
        caller_of(request).principal.check_may_use(name)
    except PermissionDenied as error:
        raise error.within(field) from error


async def _is_known(request: Request, tenant: str, name: str) -> bool:
    """Whether the name means anything."""
    try:
        await asyncio.to_thread(services_of(request).registry.current, name, tenant)
    except AdapterNotFound:
        return False
    return True


def _renamed(error: ReftError, names: dict[str, str]) -> ReftError:
    """``error`` about the field that this body has for the one it was about."""
    field = names.get(error.field or "")
    if field is None or field == error.field:
        return error
    return error.within(field)
