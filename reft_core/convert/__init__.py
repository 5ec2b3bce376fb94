"""Adapters from elsewhere to our file, and back where the form allows. Offline only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from reft_core.adapter import Adapter
from reft_core.convert import adapterhub, easysteer, peft, pyreft
from reft_core.convert.adapterhub import from_adapterhub
from reft_core.convert.assembling import Converted
from reft_core.convert.base import base_from_folder, describe_config
from reft_core.convert.easysteer import from_easysteer
from reft_core.convert.options import BASE_TEMPLATE, OPTION_NAMES, ConvertOptions
from reft_core.convert.peft import from_peft
from reft_core.convert.peft.export import to_peft
from reft_core.convert.pyreft import from_pyreft
from reft_core.convert.pyreft.export import to_pyreft
from reft_core.errors import InvalidRequest

CONVERTERS: dict[str, Callable[[Path, ConvertOptions], Converted]] = {
    "pyreft": from_pyreft,
    "adapters": from_adapterhub,
    "peft": from_peft,
    "easysteer": from_easysteer,
}
"""Reader of each kind of source, by the name a user gives it."""

EXPORTERS: dict[str, Callable[[Adapter, Path], str]] = {"peft": to_peft, "pyreft": to_pyreft}
"""Writer of each kind of folder; returns what the adapter became there."""

METHODS_IN: Mapping[str, frozenset[str]] = {
    "pyreft": pyreft.METHODS,
    "adapters": adapterhub.METHODS,
    "peft": frozenset(peft.METHOD_OF.values()),
    "easysteer": easysteer.METHODS,
}
"""The methods that each kind of source can hold."""


def convert(source: Path, kind: str, options: ConvertOptions) -> bytes:
    """Our adapter file made from the foreign adapter at ``source``.

    Raises :class:`InvalidRequest` naming an option that is missing or wrong,
    :class:`~reft_core.errors.AdapterFileInvalid` naming file, key and expectation for a bad
    source, and :class:`~reft_core.errors.AdapterMismatch` for another base model's.
    """
    if kind not in CONVERTERS:
        raise InvalidRequest.because("kind", kind, "one of " + ", ".join(CONVERTERS))
    if options.phase not in (None, "prompt", "all"):
        raise InvalidRequest.because("phase", options.phase, "'prompt' or 'all'")
    return CONVERTERS[kind](source, options).to_bytes()


__all__ = [
    "BASE_TEMPLATE",
    "CONVERTERS",
    "EXPORTERS",
    "METHODS_IN",
    "OPTION_NAMES",
    "ConvertOptions",
    "Converted",
    "base_from_folder",
    "convert",
    "describe_config",
    "to_peft",
    "to_pyreft",
]
