"""``/v1/load_adapter`` and its kin: adapters from a folder of the operator's, by name and path.

For tools that manage vLLM's LoRA adapters, which post to ``/v1/load_lora_adapter`` and read a
line of text. What is loaded is uploaded to the registry, and what is unloaded deleted from it;
the folder stays as it is. All need the admin key.
"""

from __future__ import annotations

import asyncio

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    AdapterNotFound,
    InvalidRequest,
    ReftError,
    UnsupportedFeature,
)
from server.body import capped
from server.load_dir import read_below
from server.protocol.loading import (
    LoadLoraRequest,
    LoadRequest,
    UnloadLoraRequest,
    UnloadRequest,
)
from server.protocol.models import DeleteAnswer, UploadAnswer, VersionCard
from server.registry.registry import Uploaded
from server.routes.admin import delete_adapter
from server.routes.guards import AdminRoute, Handler, make_router
from server.services import Services, services_of


class LoadingRoute(AdminRoute):
    """A route that needs the admin key and takes a small JSON body."""

    def get_route_handler(self) -> Handler:
        """The route's handler behind the checks."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            most = services_of(request).settings.max_body_bytes
            return await handle(Request(request.scope, capped(request.receive, most)))

        return guarded


router = make_router(LoadingRoute, tag="admin")


@router.post("/v1/load_adapter")
async def load_adapter(body: LoadRequest, request: Request) -> UploadAnswer:
    """Make a file below the server's ``adapter_load_dir`` what ``name`` means.

    The same bytes again are no error and no new version.
    """
    services = services_of(request)
    uploaded = await _load(services, body.name, body.path, field="path")
    users = services.residency.num_users(uploaded.version.digest)
    card = VersionCard.of(uploaded.version, users)
    return UploadAnswer(**card.model_dump(), created=uploaded.created)


@router.post("/v1/unload_adapter")
async def unload_adapter(body: UnloadRequest, request: Request) -> DeleteAnswer:
    """Delete ``name`` with all its versions. Requests that use it finish undisturbed."""
    return await _unload(request, body.name, field="name")


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraRequest, request: Request) -> str:
    """The same as ``/v1/load_adapter``, in vLLM's manner: a name that is taken is an error,
    unless ``load_inplace`` is true.
    """
    services = services_of(request)
    if not body.load_inplace and await _is_known(services, body.lora_name):
        raise InvalidRequest(
            f"lora_name: the lora adapter '{body.lora_name}' has already been loaded; expected "
            "another name, or load_inplace true to replace it",
            field="lora_name",
        )
    await _load(services, body.lora_name, body.lora_path, field="lora_path", named="lora_name")
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraRequest, request: Request) -> str:
    """The same as ``/v1/unload_adapter``, in vLLM's manner."""
    await _unload(request, body.lora_name, field="lora_name")
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


async def _load(
    services: Services, name: str, path: str, *, field: str, named: str = "name"
) -> Uploaded:
    """Upload the file at ``path``; errors name the body's own fields."""
    root = services.settings.adapter_load_dir
    if root is None:
        raise UnsupportedFeature(
            f"{field}: this server loads no files; expected adapter_load_dir among its settings",
            field=field,
        )
    most = services.settings.max_adapter_bytes

    def upload() -> Uploaded:
        data = read_below(root, path, field=field, max_bytes=most)
        return services.registry.upload(name, data)

    try:
        uploaded = await asyncio.to_thread(upload)
    except (AdapterFileInvalid, AdapterMismatch) as error:  # about a field of the file
        if error.field == field:
            raise
        raise error.within(field) from error
    except ReftError as error:
        raise _renamed(error, {"name": named}) from error
    await services.pins.follow(name)
    return uploaded


async def _unload(request: Request, name: str, *, field: str) -> DeleteAnswer:
    """Delete an adapter; errors name the body's own field."""
    try:
        return await delete_adapter(name, request)
    except ReftError as error:
        raise _renamed(error, {"model": field, "name": field}) from error


async def _is_known(services: Services, name: str) -> bool:
    """Whether the name means anything."""
    try:
        await asyncio.to_thread(services.registry.current, name)
    except AdapterNotFound:
        return False
    return True


def _renamed(error: ReftError, names: dict[str, str]) -> ReftError:
    """``error`` about the field that this body has for the one it was about."""
    field = names.get(error.field or "")
    if field is None or field == error.field:
        return error
    return error.within(field)
