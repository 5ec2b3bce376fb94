"""Adapters saved by AdapterHub's `adapters` library (checked with 1.3.0).

A folder holds ``adapter_config.json`` and ``adapter.safetensors`` or ``pytorch_adapter.bin``;
``config.architecture`` says which method's module here reads them. All but ReFT act on every
token. Imported so, bottleneck adapters and LoRA have phase ``all``; the option
``phase="prompt"`` leaves generated tokens alone.

Two that have a form here are refused all the same. `adapters` runs prompt tuning on no decoder:
its own classes do not offer it, and through its plugin interface the forward fails. MAM is a union
of prefix tuning, which needs its own classes, and a parallel adapter, which in those reads the
residual stream (:mod:`.bottleneck`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reft_core.convert.adapterhub import bottleneck, lora, prefix, reft
from reft_core.convert.adapterhub.folder import CONFIG_FILE, SOURCE, SavedAdapter
from reft_core.convert.assembling import Converted
from reft_core.convert.options import ConvertOptions
from reft_core.errors import UnsupportedFeature

METHODS = reft.METHODS | bottleneck.METHODS | lora.METHODS | prefix.METHODS
"""The methods an `adapters` folder can hold."""

_READERS: dict[str | None, Callable[[SavedAdapter, ConvertOptions], Converted]] = {
    "reft": reft.read,
    None: bottleneck.read,
    "bottleneck": bottleneck.read,
    "lora": lora.read,
    "prefix_tuning": prefix.read,
}
"""By ``config.architecture``, which bottleneck adapters mostly leave out."""
_WHY_NOT = {
    "prompt_tuning": "; `adapters` runs prompt tuning on no decoder",
    "union": "; MAM's parallel adapter reads the residual stream there, and no others are composed",
}


def from_adapterhub(source: Path, options: ConvertOptions) -> Converted:
    """The adapter in a folder that `adapters` saved.

    Needs the option template, and of ReFT the method. Everything else is recorded.
    """
    options.not_used(("layers",), f"{SOURCE} records its layers")
    saved = SavedAdapter.open(source)
    architecture = saved.config.get("architecture")
    if architecture is not None and architecture not in list(_READERS):
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: config.architecture",
            architecture,
            "one of reft, lora, prefix_tuning, or none, for a bottleneck adapter"
            + _WHY_NOT.get(str(architecture), ""),
        )
    return _READERS[architecture](saved, options)
