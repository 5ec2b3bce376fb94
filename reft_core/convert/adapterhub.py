"""ReFT adapters saved by AdapterHub's `adapters` library (checked with 1.3.0).

A folder holds ``adapter_config.json`` and ``adapter.safetensors`` or ``pytorch_adapter.bin``.
Row vectors, one to two units a layer, prefix first::

    (f(hWᵀ + b) − hPᵀ)P        learned_source.{weight,bias}, projection.weight
    f(hWᵀ + b)P                the same tensors; DiReFT

P (r, d) has orthonormal rows if the config says ``orthogonality``, and is then stored by torch's
parametrisation. Whether the projection is subtracted is not stored: ``subtract_projection`` is
no dataclass field there, and a saved DiReFT comes back as NoReFT. So the method must be given.

`adapters` also edits every generated token, which ours does not: outputs agree on the prompt.
It never shortens a side, ours lets each of two sides take at most half: they agree on prompts of
at least twice the longer side, and with one side on all prompts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from reft_core.adapter import EditKey
from reft_core.convert.common import (
    Conventions,
    Converted,
    ConvertOptions,
    TensorFile,
    ask_template,
    assemble,
    check_layers,
    field_of,
    find_file,
    invalid,
    list_folder,
    position_spec,
    read_json,
    read_pickle,
    read_safetensors,
    rebuild_orthogonal,
    rotation_facts,
)
from reft_core.edits import Activation, Edit
from reft_core.errors import AdapterMismatch, InvalidRequest, UnsupportedFeature, explain
from reft_core.spec import PositionSpec

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter.safetensors"
PICKLE_FILE = "pytorch_adapter.bin"
HEAD_FILES = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")

_SOURCE = "an `adapters` folder"
_METHODS = {True: ("loreft", "direft_orthonormal"), False: ("noreft", "direft")}
METHODS = frozenset(name for pair in _METHODS.values() for name in pair)
"""The methods an `adapters` folder can hold."""
_SUBTRACTS = frozenset({"loreft", "noreft"})
_ACTIVATIONS: dict[str | None, Activation] = {
    None: "identity",
    "linear": "identity",
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
_REFT_FIELDS = frozenset(
    {
        "architecture",
        "dropout",
        "dtype",
        "init_weights_seed",
        "layers",
        "non_linearity",
        "orthogonality",
        "output_reft",
        "prefix_positions",
        "r",
        "subtract_projection",
        "suffix_positions",
        "tied_weights",
    }
)
_KEY = re.compile(
    r"[\w.]*?\.(?P<layer>\d+)\.reft_layer\.refts\.(?P<name>.+)\.units\.(?P<unit>[01])"
    r"\.(?P<part>learned_source\.weight|learned_source\.bias|projection\.weight|"
    r"projection\.parametrizations\.weight\.(?:original|0\.base))"
)


def from_adapterhub(source: Path, options: ConvertOptions) -> Converted:
    """The ReFT adapter in a folder that `adapters` saved.

    Needs the options method and template. Positions, tying and activation are recorded.
    """
    options.not_used(("layers",), "an `adapters` folder records its layers")
    options.agreeing("phase", "prompt", "this converter: generated tokens are left alone")
    files = list_folder(source)
    document = read_json(find_file(files, CONFIG_FILE, source=source))
    weights = find_file(files, SAFETENSORS_FILE, PICKLE_FILE, source=source)
    heads = [name for name in HEAD_FILES if name in files]
    if heads:
        raise UnsupportedFeature.because("source", heads, "a folder without a prediction head")
    config = _reft_config(document, options)
    positions, stored_units, used_units = _positions(config, options)
    method = _method(config, options)
    activation = _activation(config, options)
    r = field_of(config, CONFIG_FILE, "r", int, "the rank, a whole number")
    if not 1 <= r <= options.base.hidden_size:
        raise invalid(CONFIG_FILE, "r", r, f"1 to {options.base.hidden_size}")
    tensors = (
        read_safetensors(weights) if weights.name == SAFETENSORS_FILE else read_pickle(weights)
    )
    prefixes = _unit_prefixes(tensors)
    found = sorted({layer for layer, _ in prefixes})
    _check_layers_listed(config, found, options)
    edits = {}
    for layer in found:
        for unit in range(stored_units):
            if (layer, unit) not in prefixes:
                raise invalid(tensors.file, f"layer {layer}", "no such unit", f"unit {unit}")
            edit = _read_unit(
                tensors, prefixes[layer, unit], options.base.hidden_size, r, method, activation
            )
            if unit in used_units:
                edits[EditKey(layer, "block_output", used_units.index(unit))] = edit
    tensors.finish()
    name = options.name or field_of(document, CONFIG_FILE, "name", str, "the adapter's name")
    conventions = Conventions(
        method=method,
        positions=positions,
        template=ask_template(options, _SOURCE),
        name=name,
        tool="converted from adapters",
        facts={
            "source_version": str(document.get("version", ""))[:256],
            **(rotation_facts(edits.values()) if method in _METHODS[True] else {}),
        },
    )
    return assemble(edits, conventions, options)


def _reft_config(document: dict[str, Any], options: ConvertOptions) -> dict[str, Any]:
    """The method's own settings, once they are ReFT's and made for this base model."""
    config: dict[str, Any] = field_of(document, CONFIG_FILE, "config", dict, "an object")
    if config.get("architecture") != "reft":
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: config.architecture",
            config.get("architecture"),
            "'reft'; other methods of `adapters` are not imported",
        )
    unknown = sorted(set(config) - _REFT_FIELDS)
    if unknown:
        raise invalid(CONFIG_FILE, "config", unknown, "only " + ", ".join(sorted(_REFT_FIELDS)))
    if config.get("output_reft", True) is not True:
        raise invalid(CONFIG_FILE, "config.output_reft", config["output_reft"], "true")
    for key, expected in (
        ("hidden_size", options.base.hidden_size),
        ("model_type", options.base.architecture),
    ):
        if document.get(key) != expected:
            raise AdapterMismatch(
                explain(
                    f"{CONFIG_FILE}: {key}",
                    document.get(key),
                    f"{expected!r}, as in {options.base.name}",
                ),
                field=key,
            )
    return config


def _positions(
    config: dict[str, Any], options: ConvertOptions
) -> tuple[PositionSpec, int, list[int]]:
    """Position rule, number of units stored, and which of them the rule uses.

    `adapters` stores two units whenever weights are not tied, also if one side has no
    positions; that unit then edits nothing and is left out.
    """
    whole = "a whole number of positions"
    first = field_of(config, CONFIG_FILE, "prefix_positions", int, whole)
    last = field_of(config, CONFIG_FILE, "suffix_positions", int, whole)
    tied = field_of(config, CONFIG_FILE, "tied_weights", bool, "true or false")
    if first < 0 or last < 0 or first + last == 0:
        raise invalid(
            CONFIG_FILE,
            "prefix_positions, suffix_positions",
            (first, last),
            "at least one position",
        )
    rule = "+".join([f"f{first}"] * (first > 0) + [f"l{last}"] * (last > 0))
    options.agreeing("positions", rule, CONFIG_FILE)
    options.agreeing("tied", tied, CONFIG_FILE)
    options.agreeing("anchor", "prompt_end", "the equation of `adapters`")
    positions = position_spec(
        rule,
        tied=tied or not (first and last),
        anchor="prompt_end",
        cap=options.cap or "shared",
    )
    if tied:
        return positions, 1, [0]
    return positions, 2, [unit for unit, count in enumerate((first, last)) if count]


def _method(config: dict[str, Any], options: ConvertOptions) -> str:
    """The method option: two fit each setting of ``orthogonality``."""
    orthogonal = field_of(config, CONFIG_FILE, "orthogonality", bool, "true or false")
    allowed = " or ".join(
        f"'{name}' ({'subtracts' if name in _SUBTRACTS else 'does not subtract'} the projection)"
        for name in _METHODS[orthogonal]
    )
    method: str = options.required(
        "method", allowed, f"{_SOURCE} does not record whether the projection is subtracted"
    )
    if method not in _METHODS[orthogonal]:
        raise InvalidRequest.because(
            "method", method, f"{allowed}, since {CONFIG_FILE} says orthogonality={orthogonal}"
        )
    recorded = config.get("subtract_projection")
    if recorded is not None and recorded != (method in _SUBTRACTS):
        raise InvalidRequest.because(
            "method", method, f"one with subtract_projection={recorded}, as {CONFIG_FILE} says"
        )
    return method


def _activation(config: dict[str, Any], options: ConvertOptions) -> Activation:
    """Our name of ``non_linearity``."""
    given = config.get("non_linearity")
    name = given.lower() if isinstance(given, str) else given
    if (name is not None and not isinstance(name, str)) or name not in _ACTIVATIONS:
        raise invalid(
            CONFIG_FILE,
            "config.non_linearity",
            given,
            "null or one of " + ", ".join(str(known) for known in _ACTIVATIONS if known),
        )
    activation = _ACTIVATIONS[name]
    options.agreeing("activation", activation, CONFIG_FILE)
    return activation


def _unit_prefixes(tensors: TensorFile) -> dict[tuple[int, int], str]:
    """For each layer and unit, what its tensors' names begin with."""
    prefixes: dict[tuple[int, int], str] = {}
    names = set()
    for key in tensors.keys:
        match = _KEY.fullmatch(key)
        if not match:
            raise invalid(
                tensors.file, "keys", key, "…<layer>.reft_layer.refts.<name>.units.<0 or 1>.<part>"
            )
        names.add(match["name"])
        prefix = key[: match.start("part")]
        if prefixes.setdefault((int(match["layer"]), int(match["unit"])), prefix) != prefix:
            raise invalid(tensors.file, key, "a second unit of its number", "one a layer")
    if len(names) != 1:
        raise invalid(tensors.file, "keys", sorted(names), "exactly one adapter")
    return prefixes


def _check_layers_listed(config: dict[str, Any], found: list[int], options: ConvertOptions) -> None:
    """The layers in the tensor file are those the config names and the base model has."""
    listed = config.get("layers")
    if listed == "all":
        expected = list(range(options.base.num_layers))
    elif isinstance(listed, list) and all(type(layer) is int for layer in listed):
        expected = sorted(set(listed))
    else:
        raise invalid(CONFIG_FILE, "config.layers", listed, "'all' or a list of whole numbers")
    check_layers(found, options.base, CONFIG_FILE)
    if found != expected:
        raise invalid(CONFIG_FILE, "config.layers", listed, f"{found}, as in the tensor file")


def _read_unit(
    tensors: TensorFile, prefix: str, d: int, r: int, method: str, activation: Activation
) -> Edit:
    """One unit's edit."""
    if method in _METHODS[True]:
        stored = f"{prefix}projection.parametrizations.weight"
        up = rebuild_orthogonal(tensors, stored, d, r).mT
    else:
        up = tensors.take(f"{prefix}projection.weight", (r, d))
    return Edit(
        down=tensors.take(f"{prefix}learned_source.weight", (r, d)).mT,
        skip=up.mT if method in _SUBTRACTS else None,
        up=up,
        bias=tensors.take(f"{prefix}learned_source.bias", (r,)),
        activation=activation,
    )
