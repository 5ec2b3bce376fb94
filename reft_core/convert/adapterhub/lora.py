"""LoRA. Row vectors::

    xW + (α/r)·(xAᵀ)Bᵀ    <module>.loras.<name>.lora_{A,B}, (r, in) and (out, r)

A tensor's name says which map it acts on, and that is followed: of a Llama or Mistral,
``intermediate_lora`` is on down_proj and ``output_lora`` on up_proj, of other models the other
way round. gate_proj and the attention's output projection never have one.

GPT-2's fused c_attn has the A of q, k and v above one another, as far as ``attn_matrices``
names them, and likewise each B. One edit holds them: their ranks side by side, and zeros in
``up`` where a rank's map does not write.

Versions before 1.1.0 left out α/r while training; `adapters` itself then reads α as r.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import EditKey
from reft_core.convert.adapterhub.folder import CONFIG_FILE, NAME, SavedAdapter, check_one_name
from reft_core.convert.assembling import Converted, assemble
from reft_core.convert.linear_maps import LinearMap, lora_edit, place_linear_maps
from reft_core.convert.options import ConvertOptions, whole_prompt
from reft_core.convert.reading import field_of, invalid
from reft_core.convert.tensor_file import TensorFile
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_RANK

METHODS = frozenset({"lora"})

_FIELDS = frozenset(
    {
        "alpha",
        "attn_matrices",
        "dropout",
        "dtype",
        "init_weights",
        "init_weights_seed",
        "intermediate_lora",
        "leave_out",
        "output_lora",
        "r",
        "selfattn_lora",
    }
)
_FIXED: dict[str, tuple[Any, str]] = {
    "composition_mode": ("add", "'scale' multiplies the map's output, as (IA)³ does"),
    "use_dora": (False, "DoRA rescales the base model's weights"),
    "use_gating": (False, "a gate averages over the tokens of a prompt"),
    "vera_b": (None, "VeRA trains vectors between shared random matrices"),
    "vera_d": (None, "VeRA trains vectors between shared random matrices"),
}
_FUSED = {"gpt2": "linear:attn.c_attn"}
"""The map that makes q, k and v at once, where there is one."""
_KEY = re.compile(rf"(?P<path>[\w.]{{1,256}}?)\.loras\.{NAME}\.lora_[AB]")
_OLD_SCALING = re.compile(r"adapters\.(0\.\d|1\.0\b)")


def read(saved: SavedAdapter, options: ConvertOptions) -> Converted:
    """The edit of every linear map in the folder."""
    saved.check_settings(_FIELDS, _FIXED)
    saved.check_base(options.base)
    source = f"{CONFIG_FILE}: lora"
    options.agreeing("activation", "identity", source)
    positions = whole_prompt(options, "lora", source)
    r, scale = _rank_and_scale(saved)
    matrices = _attention_matrices(saved)
    fused = _FUSED.get(options.base.architecture)
    tensors = saved.read_tensors()
    edits = {}
    for name, linear in _maps(saved, tensors, options.base, matrices, fused).items():
        in_size, out_size = options.base.sites[linear.site]
        if linear.site == fused:
            k = len(matrices)
            a = tensors.take(f"{name}A", (k * r, in_size))
            b = _spread(tensors.take(f"{name}B", (k * (out_size // 3), r)), matrices, out_size)
        else:
            a = tensors.take(f"{name}A", (r, in_size))
            b = tensors.take(f"{name}B", (out_size, r))
        edits[EditKey(linear.layer, linear.site, 0)] = lora_edit(a, b, scale)
    tensors.finish()
    conventions = saved.conventions("lora", positions, options, phase=options.phase or "all")
    return assemble(edits, conventions, options)


def _rank_and_scale(saved: SavedAdapter) -> tuple[int, float]:
    """r and α/r."""
    r = field_of(saved.config, CONFIG_FILE, "r", int, "the rank, a whole number")
    if not 1 <= r <= MAX_RANK:
        raise invalid(CONFIG_FILE, "config.r", r, f"1 to {MAX_RANK}")
    alpha = saved.config.get("alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        raise invalid(CONFIG_FILE, "config.alpha", alpha, "a positive number")
    return r, 1.0 if _OLD_SCALING.match(saved.version) else alpha / r


def _attention_matrices(saved: SavedAdapter) -> list[str]:
    """Those of q, k and v that have LoRA, in this order."""
    named = saved.config.get("attn_matrices")
    if not isinstance(named, list) or not all(name in ("q", "k", "v") for name in named):
        raise invalid(CONFIG_FILE, "config.attn_matrices", named, "a list of 'q', 'k' and 'v'")
    if not saved.flag("selfattn_lora", default=True):
        return []
    return [name for name in "qkv" if name in named]


def _maps(
    saved: SavedAdapter,
    tensors: TensorFile,
    base: ModelDescription,
    matrices: list[str],
    fused: str | None,
) -> dict[str, LinearMap]:
    """The linear maps that have LoRA, by what their tensors' names begin with.

    Each layer that is not left out must have as many as the config says, and the same ones.
    """
    prefixes, keys, names = {}, {}, set()
    for key in tensors.keys:
        match = _KEY.fullmatch(key)
        if match is None:
            raise invalid(tensors.file, "keys", key, "<module>.loras.<name>.lora_A or lora_B")
        prefixes[match["path"]], keys[match["path"]] = key[:-1], key
        names.add(match["name"])
    check_one_name(names, tensors)
    placed = place_linear_maps(keys, tensors.file, base)
    sites = sorted({linear.site for linear in placed})
    if fused is None:
        promised = list(matrices)
        attention = [x for site in sites if (x := site.rpartition(".")[2][0]) in "qkv"]
    else:
        promised = [fused] * bool(matrices)
        attention = [site for site in sites if site == fused]
    in_mlp = [saved.flag(key, default=False) for key in ("intermediate_lora", "output_lora")]
    if sorted(attention) != sorted(promised) or len(sites) - len(attention) != sum(in_mlp):
        expected = f"maps of {matrices} and {sum(in_mlp)} of the MLP, as {CONFIG_FILE} says"
        raise invalid(tensors.file, "keys", sites, expected)
    kept = saved.layers(base)
    for layer in range(base.num_layers):
        found = sorted(linear.site for linear in placed if linear.layer == layer)
        expected_here = sites if layer in kept else []
        if found != expected_here:
            raise invalid(tensors.file, f"layer {layer}", found, f"LoRA on {expected_here}")
    return {prefixes[linear.path]: linear for linear in placed}


def _spread(b: Tensor, matrices: list[str], out_size: int) -> Tensor:
    """B (out, k·r) of a fused map, from the k matrices' own B above one another."""
    third, r = out_size // 3, b.shape[1]
    whole = torch.zeros(out_size, len(matrices) * r)
    for i, name in enumerate(matrices):
        start = "qkv".index(name) * third
        whole[start : start + third, i * r : (i + 1) * r] = b[i * third : (i + 1) * third]
    return whole
