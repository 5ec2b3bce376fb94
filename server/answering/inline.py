"""Adapters that come with the request they are for, as base64 of a file.

They are read as the hostile input they are, stay in memory only while a request uses them, and
are never in the registry.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from reft_core.adapter import Adapter, check_fits, decode_adapter
from reft_core.errors import (
    AdapterError,
    AdapterFileInvalid,
    AdapterTooLarge,
    UnsupportedFeature,
    explain,
)
from reft_core.sites import ModelDescription
from reft_core.spec import AdapterSpec
from reft_core.threads import run_in_own_thread


@dataclass(frozen=True, eq=False)
class InlineAdapter:
    """An adapter that nobody registered; answers name it by its digest alone."""

    adapter: Adapter
    name: str = "(inline)"
    """What metrics and logs call it; no name of the registry has brackets."""
    tenant: str = ""
    number: None = None
    """It is no version of any name."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return self.adapter.digest

    @property
    def spec(self) -> AdapterSpec:
        """What the file says of itself."""
        return self.adapter.spec

    @property
    def resident_bytes(self) -> int:
        """Bytes it takes in memory once it is loaded."""
        return self.adapter.resident_bytes

    @property
    def reference(self) -> str:
        """How answers name it. No ``model`` value: nothing is kept of it."""
        return f"inline@sha256:{self.digest[:12]}"


@dataclass(frozen=True)
class InlineReader:
    """Reads the adapters that requests bring for one base model."""

    model: ModelDescription
    max_bytes: int | None
    """Most bytes of a file; None takes no inline adapters at all."""

    def read(self, text: str, field: str) -> InlineAdapter:
        """The adapter in ``text``, which the request has as ``field``. Blocks.

        Raises, about ``field``, :class:`UnsupportedFeature` where they are not taken,
        :class:`AdapterTooLarge`, :class:`AdapterFileInvalid` and :class:`AdapterMismatch`.
        """
        if self.max_bytes is None:
            raise UnsupportedFeature.because(
                field, _shown(text), "it left out: this server takes no inline adapters"
            )
        if len(text) > encoded_length(self.max_bytes):
            allowed = f"at most {self.max_bytes} bytes once decoded"
            raise AdapterTooLarge(explain(field, _shown(text), allowed), field=field)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise AdapterFileInvalid(
                f"{field}: not base64 of an adapter file ({error})", field=field
            ) from None
        max_bytes = self.max_bytes
        try:
            adapter = run_in_own_thread(lambda: decode_adapter(data, max_bytes=max_bytes))
            check_fits(adapter.spec, self.model)
        except AdapterError as error:
            raise error.within(field) from error
        return InlineAdapter(adapter)


def encoded_length(num_bytes: int) -> int:
    """Characters that base64 makes of so many bytes."""
    return 4 * -(-num_bytes // 3)


def _shown(text: str) -> str:
    """What an error says of an encoded file."""
    return f"{len(text)} characters of base64"
