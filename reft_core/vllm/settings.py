"""What the plugin is told: ``--additional-config '{"reft": {...}}'`` of vLLM.

There vLLM carries it to every process and every node by itself. A server of many nodes names a
place that all of them can read.
"""

from __future__ import annotations

import getpass
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reft_core.errors import InvalidRequest, explain
from reft_core.spec import Site

KEY = "reft"
"""Of the settings in ``additional_config``."""

Unproved = Literal["async_scheduling", "v2_runner", "cuda", "architecture", "kv_connector"]


class Settings(BaseModel):
    """The plugin's settings. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: tuple[str, ...] = Field(
        default=(), description="folders or fsspec URLs with adapter files, under any names"
    )
    look_interval_s: float = Field(
        default=5, ge=0, description="least time between two looks at them for what has changed"
    )
    sites: tuple[Site, ...] = Field(
        default=("block_output",),
        min_length=1,
        description="where edits may act; each costs every step a little, and is fixed at start",
    )
    resident_bytes: int = Field(
        default=1 << 30, ge=0, description="memory of a worker's device for adapters at rest"
    )
    spool: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / f"reft-vllm-{getpass.getuser()}",
        description="folder of this machine for the files that arrive while it runs",
    )
    spool_bytes: int = Field(
        default=16 << 30,
        ge=0,
        description="above, those go that were not used for longest, but for those held",
    )
    allow_unproved: frozenset[Unproved] = Field(
        default=frozenset(), description="ways to run vLLM that no test of ours has been through"
    )

    @classmethod
    def of(cls, vllm_config: Any) -> Settings:
        """The settings of a ``VllmConfig``. Raises :class:`InvalidRequest` naming the wrong one."""
        extra = vllm_config.additional_config
        given = extra.get(KEY, {}) if isinstance(extra, dict) else {}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in ("additional_config", KEY, *problem["loc"]))
            raise InvalidRequest(
                explain(field, problem["input"], problem["msg"]), field=field
            ) from None
