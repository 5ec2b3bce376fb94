"""``traceparent``: the trace that a caller says its request belongs to (W3C Trace Context)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

HEADER = "traceparent"

_FORM = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
    r"(?P<rest>-.*)?"
)
_SAMPLED = 0x01


@dataclass(frozen=True)
class TraceContext:
    """A caller's span."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    is_sampled: bool


def parse_traceparent(values: Sequence[str]) -> TraceContext | None:
    """The context in a request's ``traceparent`` headers; None if there is not exactly one, in
    the form that the standard demands."""
    if len(values) != 1 or not (found := _FORM.fullmatch(values[0].strip())):
        return None
    if found["version"] == "ff" or (found["version"] == "00" and found["rest"]):
        return None
    if not int(found["trace"], 16) or not int(found["span"], 16):
        return None
    is_sampled = bool(int(found["flags"], 16) & _SAMPLED)
    return TraceContext(found["trace"], found["span"], is_sampled)
