"""Trainable methods, by name. A new one is a class in its own file and a line here."""

from __future__ import annotations

from reft_core.errors import InvalidRequest
from reft_core.methods.base import Intervention, SiteSizes
from reft_core.methods.bitfit import BitFit
from reft_core.methods.consreft import ConsReFT
from reft_core.methods.direft import DiReFT
from reft_core.methods.direft_orthonormal import DiReFTOrthonormal
from reft_core.methods.interchange import Interchange
from reft_core.methods.lobireft import LobiReFT
from reft_core.methods.lora import LoRA
from reft_core.methods.loreft import LoReFT
from reft_core.methods.multi_head_parallel_adapter import MultiHeadParallelAdapter
from reft_core.methods.noreft import NoReFT
from reft_core.methods.parallel_adapter import ParallelAdapter
from reft_core.methods.red import RED
from reft_core.methods.scaled_parallel_adapter import ScaledParallelAdapter
from reft_core.methods.series_adapter import SeriesAdapter
from reft_core.methods.steering import Steering

_ALL: tuple[type[Intervention], ...] = (
    LoReFT,
    DiReFT,
    DiReFTOrthonormal,
    NoReFT,
    ConsReFT,
    LobiReFT,
    RED,
    Steering,
    Interchange,
    SeriesAdapter,
    ParallelAdapter,
    ScaledParallelAdapter,
    MultiHeadParallelAdapter,
    LoRA,
    BitFit,
)
METHODS: dict[str, type[Intervention]] = {cls.method: cls for cls in _ALL}


def get_method(name: str) -> type[Intervention]:
    """The method class called ``name``. Raises :class:`InvalidRequest` for unknown names."""
    try:
        return METHODS[name]
    except KeyError:
        allowed = "one of " + ", ".join(sorted(METHODS))
        raise InvalidRequest.because("method", name, allowed) from None


__all__ = ["METHODS", "Intervention", "SiteSizes", "get_method"]
