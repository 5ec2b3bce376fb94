"""Bodies of the routes that load and unload adapters by path, in vLLM's words and in ours."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.protocol.options import RequestBody


class LoadRequest(RequestBody):
    """Body of ``POST /v1/load_adapter``."""

    name: str = Field(max_length=256)
    path: str = Field(
        max_length=4096, description="below the server's adapter_load_dir: a file, or its folder"
    )


class UnloadRequest(RequestBody):
    """Body of ``POST /v1/unload_adapter``."""

    name: str = Field(max_length=256)


class LoadLoraRequest(RequestBody):
    """Body of ``POST /v1/load_lora_adapter``, as vLLM has it."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(
        max_length=4096, description="below the server's adapter_load_dir: a file, or its folder"
    )
    load_inplace: bool = Field(False, description="replace what the name means, if anything")
    base_model_name: str | None = Field(None, description="accepted, without effect")
    is_3d_lora_weight: Literal[False] = Field(False, description="false only")


class UnloadLoraRequest(RequestBody):
    """Body of ``POST /v1/unload_lora_adapter``, as vLLM has it."""

    lora_name: str = Field(max_length=256)
    lora_int_id: Any = Field(None, description="accepted, without effect")
