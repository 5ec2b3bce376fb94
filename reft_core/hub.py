"""What is on a hub: whether a model can be had from it at all, and adapters' files."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from reft_core.errors import AdapterTooLarge, InvalidRequest, explain

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
"""An adapter's file in its repository."""

_NO_CONNECTION = ("ConnectError", "ConnectTimeout")
"""Errors of httpx, or of httpx2 in later releases of the hub's client, which exports neither."""
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_SUFFIX = ".safetensors"
_MAIN = "main"
_FIELD = "adapters"
"""The setting that names them."""


def is_unreachable(error: Exception) -> bool:
    """Whether there was no connection."""
    return type(error).__name__ in _NO_CONNECTION


def why_unreachable(name: str) -> str | None:
    """Why neither this machine nor a hub has the model ``name``, if there is no connection.

    Asks the hub once, within ``HF_HUB_ETAG_TIMEOUT``; its own client goes on for half a minute
    where no name is resolved, and for many behind a firewall that drops packets. None also where
    the hub answers slowly or with an error, which loading sees to and waits for.
    """
    try:
        if Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HFValidationError:
        return None  # a path, and no id that a hub could know
    except Exception as error:
        if is_unreachable(error):
            return f"no such folder, not in the hub's cache, and no {constants.ENDPOINT}: {error}"
    return None


def fetch_adapter(name: str, max_bytes: int) -> Path:
    """Where the adapter file of a hub's repository is on this machine, fetched if need be.

    ``name`` is ``owner/name`` or ``owner/name@revision``. The file is
    :data:`ADAPTER_FILE`, or else the only ``.safetensors`` file at the top. Without a connection,
    and while the hub is in trouble, it is the one that was fetched last, with a warning; one that
    the hub refuses is none. Raises, about ``adapters``, :class:`InvalidRequest` and
    :class:`AdapterTooLarge`.
    """
    repo, _, revision = name.partition("@")
    revision = revision or _MAIN
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        return Path(hf_hub_download(repo, _adapter_in(sizes, name, max_bytes), revision=revision))
    except HFValidationError as error:
        expected = f"a name that a hub may have ({error})"
        raise InvalidRequest.because(_FIELD, name, expected) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answers with status {status}"
        if status < _SERVER_ERROR and status != _TOO_MANY_REQUESTS:
            raise _not_there(name, reason) from None
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except Exception as error:
        if not is_unreachable(error):
            raise
        reason = f"no connection to {constants.ENDPOINT}: {error}"
    try:
        kept = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise _not_there(name, reason) from None
    log.warning("%s: the copy that was fetched last is used (%s)", name, reason)
    sizes = {file.name: file.stat().st_size for file in kept.iterdir()}
    return kept / _adapter_in(sizes, name, max_bytes)


def _not_there(name: str, reason: str) -> InvalidRequest:
    expected = f"an adapter file, a folder with some directly in it, or a hub's id ({reason})"
    return InvalidRequest.because(_FIELD, name, expected)


def _adapter_in(files: dict[str, int], name: str, max_bytes: int) -> str:
    """The adapter among the files of a repository, whose sizes these are."""
    at_top = [file for file in files if file.endswith(_SUFFIX) and "/" not in file]
    if ADAPTER_FILE not in at_top and len(at_top) != 1:
        expected = f"a repository with {ADAPTER_FILE}, or one {_SUFFIX} file, and not {len(at_top)}"
        raise InvalidRequest.because(_FIELD, name, expected)
    file = ADAPTER_FILE if ADAPTER_FILE in at_top else at_top[0]
    if files[file] > max_bytes:
        size = f"{name}, {files[file]} bytes"
        raise AdapterTooLarge(explain(_FIELD, size, f"at most {max_bytes} bytes"), field=_FIELD)
    return file
