"""Bottleneck adapters: A(x) = s·(f(xDᵀ + b)Uᵀ + b'), on layers that normalise what they read.

Stored as ``adapter_down.0.{weight,bias}`` (r, d), ``adapter_up.{weight,bias}`` (d, r) and, where
s is ``learned`` or one number a ``channel``, ``scaling``. Say a sublayer (attention or MLP) adds
h to the residual stream, r of which entered the layer norm before it. `adapters` makes of it::

    sequential                      r + h + A(h)          series, at the sublayer's output
    sequential, original_ln_before  r + h + A(r + h)      series, at the block's output
    parallel                        r + h + A(r)          of this there is no form here

The second (Pfeiffer's, the default there) exists here behind the MLP only: behind attention,
r + h is no output of any module. Its residual is r + h too with ``residual_before_ln`` false
and ``original_ln_after`` false (AdapterPlus). Other combinations lose r or count it twice.

He et al.'s parallel adapter reads what the sublayer reads, so after the layer norm. `adapters`
hands it r, except where its plugin interface says ``layer_pre_ffn: mlp``. Then it is::

    parallel                        r + h + A(LN(r))      parallel, from the MLP's input

An adapter made through the interface has ``adapter_interface.json`` beside it, which is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reft_core.adapter import EditKey
from reft_core.convert.adapterhub.folder import (
    CONFIG_FILE,
    INTERFACE_FILE,
    MODULE,
    NAME,
    SavedAdapter,
    module_prefixes,
)
from reft_core.convert.assembling import Converted, assemble
from reft_core.convert.options import ConvertOptions, whole_prompt
from reft_core.convert.reading import invalid
from reft_core.convert.tensor_file import TensorFile
from reft_core.edits import Activation, Edit, Source
from reft_core.errors import UnsupportedFeature
from reft_core.sites import ModelDescription

METHODS = frozenset({"series_adapter", "parallel_adapter", "scaled_parallel_adapter"})

_FIELDS = frozenset(
    {
        "adapter_residual_before_ln",  # of ln_after
        "dropout",
        "init_weights",
        "init_weights_seed",
        "inv_adapter_reduction_factor",
        "is_parallel",
        "leave_out",
        "mh_adapter",
        "non_linearity",
        "original_ln_after",
        "original_ln_before",
        "output_adapter",
        "reduction_factor",
        "residual_before_ln",
        "scaling",
        "stochastic_depth",  # of training
        *("factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity", "learn_phm"),
        *("phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank"),
        *("shared_W_phm", "shared_phm_rule"),
    }
)
_FIXED: dict[str, tuple[Any, str]] = {
    "cross_adapter": (False, "a decoder alone has no cross-attention"),
    "inv_adapter": (None, "invertible adapters edit embeddings"),
    "ln_after": (False, "a layer norm inside the adapter is not linear"),
    "ln_before": (False, "a layer norm inside the adapter is not linear"),
    "phm_layer": (False, "Compacter's matrices are products of parts that layers may share"),
    "use_gating": (False, "a gate averages over the tokens of a prompt"),
}
_KEY = re.compile(
    rf"{MODULE}(?P<layer>\d{{1,5}})\.(?P<place>attention_adapters|output_adapters)"
    rf"\.adapters\.{NAME}\.(?P<part>adapter_(?:down\.0|up)\.(?:weight|bias)|scaling)"
)
_KNOWN = ("gpt2", "llama", "mistral")
"""Architectures that `adapters` has classes for, which need no interface."""
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = ("gpt2", *_LLAMA_LIKE)
_INTERFACE = {
    "layer_self_attn": "self_attn",
    "attn_o_proj": "o_proj",
    "layer_output_proj": "mlp.down_proj",
    "layer_ln_1": None,
    "layer_ln_2": None,
}
"""What an interface to a Llama-like model must say for the equations above to hold."""
_HANDED_OVER: dict[str, Literal["stream", "mlp_input"]] = {
    "post_attention_layernorm": "stream",
    "mlp": "mlp_input",
}
"""What an adapter at the MLP is given as r, by ``layer_pre_ffn``."""


@dataclass(frozen=True)
class _Form:
    """What a folder's adapters compute, in our terms."""

    method: str
    source: Source
    sites: dict[str, str]
    """Our site for each place that has adapters."""


def read(saved: SavedAdapter, options: ConvertOptions) -> Converted:
    """The edits behind attention, behind the MLP, or both."""
    saved.check_settings(_FIELDS, _FIXED)
    saved.check_base(options.base)
    form = _form(saved, options.base)
    activation = saved.activation()
    source = f"{CONFIG_FILE}: a bottleneck adapter"
    options.agreeing("activation", activation, source)
    positions = whole_prompt(options, form.method, source)
    layers = saved.layers(options.base)
    ranks = {layer: _rank(saved, layer, options.base.hidden_size) for layer in layers}
    tensors = saved.read_tensors()
    prefixes = module_prefixes(
        tensors, _KEY, "…<layer>.<attention or output>_adapters.adapters.<name>.<part>"
    )
    edits = {}
    for layer in layers:
        for place, site in form.sites.items():
            prefix = prefixes.pop((layer, place), None)
            if prefix is None:
                raise invalid(
                    tensors.file, f"layer {layer}", "no such adapter", f"{place}, as {source} says"
                )
            edits[EditKey(layer, site, 0)] = _read_one(
                saved, tensors, prefix, (options.base.hidden_size, ranks[layer]), activation, form
            )
    tensors.finish()
    conventions = saved.conventions(form.method, positions, options, phase=options.phase or "all")
    return assemble(edits, conventions, options)


def _form(saved: SavedAdapter, base: ModelDescription) -> _Form:
    """Method and sites, once the settings are known to have an exact form here."""
    if base.architecture not in _ARCHITECTURES:
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: model_type",
            base.architecture,
            f"one of {', '.join(_ARCHITECTURES)}: where a bottleneck adapter sits depends on "
            "the layer, and others were not compared",
        )
    places = {
        "attention_adapters": saved.flag("mh_adapter", default=False),
        "output_adapters": saved.flag("output_adapter", default=False),
    }
    if not any(places.values()):
        raise invalid(
            CONFIG_FILE, "config.mh_adapter, config.output_adapter", (False, False), "one of them"
        )
    reads = _mlp_adapter_reads(saved, base)
    if saved.flag("is_parallel", default=False):
        return _parallel(saved, places["attention_adapters"], reads)
    if not saved.flag("original_ln_before", default=False):
        _expect(saved, "original_ln_after", True, "else the residual is lost")
        if saved.config.get("residual_before_ln", True) not in (True, False):
            _expect(saved, "residual_before_ln", True, "`adapters` fails on it here")
        sites = {"attention_adapters": "attn_output", "output_adapters": "mlp_output"}
        used = {place: site for place, site in sites.items() if places[place]}
        return _Form("series_adapter", "output", used)
    if places["attention_adapters"]:
        _expect(saved, "mh_adapter", False, "with original_ln_before it reads r + h")
    if reads != "stream":
        raise UnsupportedFeature.because(
            f"{INTERFACE_FILE}: layer_pre_ffn",
            (saved.interface or {}).get("layer_pre_ffn"),
            "'post_attention_layernorm' with config.original_ln_before",
        )
    after = saved.flag("original_ln_after", default=True)
    if saved.interface is not None:
        _expect(saved, "original_ln_after", True, "as the interface of `adapters` demands")
    _expect(saved, "residual_before_ln", after, "else the residual is lost or counted twice")
    return _Form("series_adapter", "output", {"output_adapters": "block_output"})


def _expect(saved: SavedAdapter, key: str, expected: bool, why: str) -> None:
    """Refuse any other value of a setting."""
    value = saved.config.get(key, True)
    if value is not expected:
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: config.{key}", value, f"{expected}: {why}"
        )


def _mlp_adapter_reads(
    saved: SavedAdapter, base: ModelDescription
) -> Literal["stream", "mlp_input"]:
    """What an adapter at the MLP gets beside the MLP's output."""
    if saved.interface is None and base.architecture in _KNOWN:
        return "stream"
    if saved.interface is None:
        raise invalid(INTERFACE_FILE, "file", None, f"one, with {base.architecture}")
    if base.architecture not in _LLAMA_LIKE:
        raise UnsupportedFeature.because(
            f"{INTERFACE_FILE}: model_type", base.architecture, "one of " + ", ".join(_LLAMA_LIKE)
        )
    for key, expected in _INTERFACE.items():
        if saved.interface.get(key) != expected:
            raise UnsupportedFeature.because(
                f"{INTERFACE_FILE}: interface.{key}", saved.interface.get(key), repr(expected)
            )
    hook = saved.interface.get("layer_pre_ffn")
    if not isinstance(hook, str) or hook not in _HANDED_OVER:
        raise UnsupportedFeature.because(
            f"{INTERFACE_FILE}: interface.layer_pre_ffn", hook, "one of " + ", ".join(_HANDED_OVER)
        )
    return _HANDED_OVER[hook]


def _parallel(saved: SavedAdapter, at_attention: bool, reads: str) -> _Form:
    """The form of a parallel adapter: its input must be the MLP's."""
    if reads != "mlp_input":
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: config.is_parallel",
            True,
            "false, or an interface with layer_pre_ffn 'mlp': otherwise `adapters` reads the "
            "residual stream before the layer norm, which is no sublayer's input",
        )
    if at_attention:
        _expect(saved, "mh_adapter", False, "beside attention it reads the residual stream")
    _expect(saved, "original_ln_after", True, "else the residual is lost")
    scaled = saved.config.get("scaling", 1.0) != 1.0
    method = "scaled_parallel_adapter" if scaled else "parallel_adapter"
    return _Form(method, "input", {"output_adapters": "mlp_output"})


def _rank(saved: SavedAdapter, layer: int, d: int) -> int:
    """⌊d / reduction_factor⌋, at least 1; the factor may differ from layer to layer."""
    given = saved.config.get("reduction_factor")
    factor = given
    if isinstance(given, dict):
        factor = given.get(str(layer), given.get("default"))
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 <= factor < 1e6:
        raise invalid(
            CONFIG_FILE,
            "config.reduction_factor",
            given,
            f"a number of at least 1, or one for layer {layer} or 'default'",
        )
    return max(1, int(d // factor))


def _read_one(
    saved: SavedAdapter,
    tensors: TensorFile,
    prefix: str,
    sizes: tuple[int, int],
    activation: Activation,
    form: _Form,
) -> Edit:
    """One adapter's edit, of ``sizes`` d and r; s goes into U and b'."""
    d, r = sizes
    up = tensors.take(f"{prefix}adapter_up.weight", (d, r)).mT  # (r, d)
    shift = tensors.take(f"{prefix}adapter_up.bias", (d,))
    scaling = saved.config.get("scaling", 1.0)
    learned = {"learned": (1,), "channel": (d,)}
    if isinstance(scaling, str) and scaling in learned:
        s = tensors.take(f"{prefix}scaling", learned[scaling])
    elif isinstance(scaling, float) and abs(scaling) <= 1e6:
        s = torch.tensor(scaling)
    else:
        allowed = "a number with a decimal point, 'learned' or 'channel'"
        raise invalid(CONFIG_FILE, "config.scaling", scaling, allowed)
    return Edit(
        down=tensors.take(f"{prefix}adapter_down.0.weight", (r, d)).mT,
        bias=tensors.take(f"{prefix}adapter_down.0.bias", (r,)),
        up=up * s,
        shift=shift * s,
        activation=activation,
        source=form.source,
    )
