"""Trainable methods, by name. A new one is a class in its own file and a line here."""

from __future__ import annotations

from reft_core.errors import InvalidRequest
from reft_core.methods.base import Intervention
from reft_core.methods.direft import DiReFT, DiReFTOrthonormal
from reft_core.methods.loreft import LoReFT

METHODS: dict[str, type[Intervention]] = {
    cls.method: cls for cls in (LoReFT, DiReFT, DiReFTOrthonormal)
}


def get_method(name: str) -> type[Intervention]:
    """The method class called ``name``. Raises :class:`InvalidRequest` for unknown names."""
    try:
        return METHODS[name]
    except KeyError:
        allowed = "one of " + ", ".join(sorted(METHODS))
        raise InvalidRequest.because("method", name, allowed) from None


__all__ = ["METHODS", "Intervention", "get_method"]
