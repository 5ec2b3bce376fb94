"""What the LoRA of every library comes down to: linear maps inside the layers, and their edits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_core.convert.assembling import check_layers
from reft_core.convert.reading import invalid
from reft_core.edits import Edit
from reft_core.errors import AdapterMismatch, UnsupportedFeature, explain
from reft_core.sites import ModelDescription


@dataclass(frozen=True)
class LinearMap:
    """One linear map that LoRA acts on."""

    path: str
    """In the base model, such as ``model.layers.0.self_attn.q_proj``."""
    layers_path: str
    layer: int
    site: str


def place_linear_maps(
    paths: Mapping[str, str], file: str, base: ModelDescription
) -> list[LinearMap]:
    """The linear maps at ``paths``, each with a key of ``file`` that names it.

    All are in one list of layers. Raises :class:`UnsupportedFeature` for a path outside the
    layers, and :class:`AdapterMismatch` for a map or layer that the base model does not have.
    """
    maps = [_place(path, key, file, base) for path, key in paths.items()]
    check_layers((found.layer for found in maps), base, file)
    lists = sorted({found.layers_path for found in maps})
    if len(lists) != 1:
        raise invalid(file, "keys", lists, "modules of one list of layers")
    return maps


def _place(path: str, key: str, file: str, base: ModelDescription) -> LinearMap:
    """Layer and site of a module's path, which ends in a linear map of a layer."""
    numbers = list(re.finditer(r"\.(\d{1,5})\.", path))
    for number in numbers:
        site = f"linear:{path[number.end() :]}"
        if site in base.sites:
            return LinearMap(path, path[: number.start()], int(number[1]), site)
    known = ", ".join(site.removeprefix("linear:") for site in base.sites if ":" in site)
    if not numbers:
        raise UnsupportedFeature.because(
            f"{file}: {key}", path, f"LoRA inside the decoder layers, on some of {known}"
        )
    raise AdapterMismatch(
        explain(f"{file}: {key}", path, f"a layer's {known}, as in {base.name}"), field=key
    )


def lora_edit(a: Tensor, b: Tensor, scale: float) -> Edit:
    """s·(xAᵀ)Bᵀ for A (r, in), B (out, r).

    A rank above the map's own is multiplied out, since it cannot be used.
    """
    (r, in_size), out_size = a.shape, b.shape[0]
    down, up = a.mT, b.mT
    if r > min(in_size, out_size):
        product = down @ up  # (in, out)
        wide = in_size >= out_size
        down, up = (product, torch.eye(out_size)) if wide else (torch.eye(in_size), product)
    return Edit(down=down, up=up, scale=scale, source="input")
