"""Whether a model can be had from a hub at all, decided in seconds."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

_NO_CONNECTION = ("ConnectError", "ConnectTimeout")
"""Errors of httpx, or of httpx2 in later releases of the hub's client, which exports neither."""


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
        if type(error).__name__ in _NO_CONNECTION:
            return f"no such folder, not in the hub's cache, and no {constants.ENDPOINT}: {error}"
    return None
