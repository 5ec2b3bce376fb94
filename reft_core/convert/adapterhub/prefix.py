"""Prefix tuning: n keys and n values a layer, before the prompt's own.

Stored as one row a virtual token, key of layer 0, value of layer 0, key of layer 1, …::

    flat      control_trans, the rows end to end (n·2·layers·KH·D,)
    else      W₂·f(W₁·e + b₁) + b₂, multiplied out here    wte (n, d), control_trans.{0,2}

The parameters are stored once for the model and once more a layer, all alike.

Where they stand differs: to `adapters` the prompt begins at position 0 behind any prefix, to us
at n. Rotary embedding knows distances only, so the keys of a Llama or Mistral, which `adapters`
leaves unrotated, are turned by n positions: each query then sees them as it did. GPT-2 has
absolute positions, for which nothing makes up, and is refused.

This is what `adapters` 1.3.0 computes with ``attn_implementation="eager"``. With sdpa, its
default, it inverts a mask that is none: without a mask, or in a padded batch, no token sees the
prefix; with a mask of ones token i sees the first i + 1 keys, prefix included. What was trained
so is not what is imported, and nothing stored tells; ``source_attention`` in the file's
provenance says which is meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_core.adapter import Prefix
from reft_core.convert.adapterhub.folder import (
    CONFIG_FILE,
    MODULE,
    NAME,
    SavedAdapter,
    check_one_name,
)
from reft_core.convert.assembling import Converted, assemble, kv_prefix
from reft_core.convert.options import ConvertOptions, whole_prompt
from reft_core.convert.reading import field_of, invalid
from reft_core.convert.tensor_file import TensorFile
from reft_core.edits import activate
from reft_core.errors import UnsupportedFeature
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_PREFIX

METHODS = frozenset({"prefix_tuning"})

_FIELDS = frozenset(
    {
        "bottleneck_size",
        "cross_prefix",  # of encoder-decoders, as the next
        "dropout",
        "encoder_prefix",
        "flat",
        "init_weights_seed",
        "non_linearity",
        "prefix_length",
        "shared_gating",
    }
)
_FIXED: dict[str, tuple[Any, str]] = {
    "leave_out": ([], "a prefix has keys and values in every layer"),
    "use_gating": (False, "a gate averages over the tokens of a prompt"),
}
_MAX_BOTTLENECK = 4096
_KEY = re.compile(
    rf"(?P<prefix>{MODULE}prefix_tunings\.{NAME}\.self_prefix\.)"
    r"(?:wte\.weight|control_trans(?:\.[02]\.(?:weight|bias))?)"
)


def read(saved: SavedAdapter, options: ConvertOptions) -> Converted:
    """The prefix, with its keys turned to where our prompts begin."""
    saved.check_settings(_FIELDS, _FIXED)
    saved.check_base(options.base)
    source = f"{CONFIG_FILE}: prefix_tuning"
    options.agreeing("activation", "identity", source)
    options.not_used(("phase",), "prefix tuning edits no hidden states")
    positions = whole_prompt(options, "prefix_tuning", source)
    if not options.base.rotary:
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: model_type",
            options.base.architecture,
            "llama or mistral with plain rotary positions and no window: a prefix moves our "
            "prompts by its length, and elsewhere its keys cannot be moved along",
        )
    n = _whole(saved, "prefix_length", MAX_PREFIX)
    rows = _rows(saved, saved.read_tensors(), n, options.base)
    spec, prefix = kv_prefix(rows, options.base)
    turned = Prefix(tuple(_turn(key, n, options.base.rotary) for key in prefix.keys), prefix.values)
    conventions = saved.conventions(
        "prefix_tuning", positions, options, facts={"source_attention": "eager"}
    )
    return assemble({}, conventions, options, (spec, turned))


def _whole(saved: SavedAdapter, key: str, most: int) -> int:
    """A positive whole number of the config."""
    value: int = field_of(saved.config, CONFIG_FILE, key, int, "a whole number")
    if not 1 <= value <= most:
        raise invalid(CONFIG_FILE, f"config.{key}", value, f"1 to {most}")
    return value


@dataclass(frozen=True)
class _Copies:
    """The tensors of a prefix, each of which the file holds several times."""

    tensors: TensorFile
    prefixes: list[str]
    """What the names of each copy begin with."""

    @classmethod
    def of(cls, tensors: TensorFile) -> _Copies:
        """The copies of the file's one prefix."""
        found = {key: _KEY.fullmatch(key) for key in tensors.keys}
        for key, match in found.items():
            if match is None:
                expected = "….prefix_tunings.<name>.self_prefix.<part>"
                raise invalid(tensors.file, "keys", key, expected)
        matches = [match for match in found.values() if match]
        check_one_name({match["name"] for match in matches}, tensors)
        return cls(tensors, sorted({match["prefix"] for match in matches}))

    def take(self, part: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``part``, taken from every copy. Raises where they differ."""
        first, *others = (self.tensors.take(f"{prefix}{part}", shape) for prefix in self.prefixes)
        for prefix, other in zip(self.prefixes[1:], others, strict=True):
            if not torch.equal(first, other):
                raise invalid(
                    self.tensors.file,
                    f"{prefix}{part}",
                    "other numbers",
                    f"those of {self.prefixes[0]}{part}",
                )
        return first


def _rows(saved: SavedAdapter, tensors: TensorFile, n: int, base: ModelDescription) -> Tensor:
    """Keys and values (n, 2·layers·KH·D), the bottleneck multiplied out."""
    width = 2 * base.num_layers * base.num_kv_heads * base.head_dim
    if saved.flag("flat", default=False):
        rows = _Copies.of(tensors).take("control_trans", (n * width,)).view(n, width)
    else:
        m, d = _whole(saved, "bottleneck_size", _MAX_BOTTLENECK), base.hidden_size
        activation = saved.activation()
        stored = _Copies.of(tensors)
        inner = F.linear(
            stored.take("wte.weight", (n, d)),
            stored.take("control_trans.0.weight", (m, d)),
            stored.take("control_trans.0.bias", (m,)),
        )  # (n, m)
        rows = F.linear(
            activate(activation, inner),
            stored.take("control_trans.2.weight", (width, m)),
            stored.take("control_trans.2.bias", (width,)),
        )  # (n, width)
    tensors.finish()
    return rows


def _turn(key: Tensor, positions: int, rotary: tuple[float, ...]) -> Tensor:
    """``key`` (KH, n, D) rotated by some positions; pair i is entries i and i + D/2."""
    angles = positions * torch.tensor(rotary)  # (D/2,)
    cos, sin = angles.cos(), angles.sin()
    first, second = key.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
