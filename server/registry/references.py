"""The forms in which a request may name an adapter."""

from __future__ import annotations

import re
from typing import NamedTuple

from server.registry.versions import is_name

MIN_DIGEST_PREFIX = 12
_REFERENCE = re.compile(
    r"(?P<name>[^@]+)(?:@(?:(?P<number>[1-9]\d{0,8})|sha256:(?P<digest>[0-9a-f]{12,64})))?"
)


class Reference(NamedTuple):
    """A name, and which of its versions: the current one if neither of the others is there."""

    name: str
    number: int | None = None
    digest: str | None = None
    """At least :data:`MIN_DIGEST_PREFIX` hex digits of it."""


def parse_reference(model: str) -> Reference | None:
    """What ``name``, ``name@3`` or ``name@sha256:<12 to 64 hex digits>`` says; None for others."""
    match = _REFERENCE.fullmatch(model)
    if match is None or not is_name(match["name"]):
        return None
    number = match["number"] and int(match["number"])
    return Reference(match["name"], number or None, match["digest"])
