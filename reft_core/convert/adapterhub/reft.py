"""ReFT. Row vectors, one to two units a layer, prefix first::

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
from typing import Any

from reft_core.adapter import EditKey
from reft_core.convert.adapterhub.folder import (
    CONFIG_FILE,
    MODULE,
    NAME,
    SOURCE,
    SavedAdapter,
    module_prefixes,
)
from reft_core.convert.assembling import Converted, assemble, check_layers
from reft_core.convert.options import ConvertOptions, position_spec
from reft_core.convert.orthogonal import rebuild_orthogonal, rotation_facts
from reft_core.convert.reading import field_of, invalid
from reft_core.convert.tensor_file import TensorFile
from reft_core.edits import Activation, Edit
from reft_core.errors import InvalidRequest
from reft_core.spec import PositionSpec

_METHODS = {True: ("loreft", "direft_orthonormal"), False: ("noreft", "direft")}
METHODS = frozenset(name for pair in _METHODS.values() for name in pair)
"""The methods that ReFT settings of `adapters` can mean."""
_SUBTRACTS = frozenset({"loreft", "noreft"})
_REFT_FIELDS = frozenset(
    {
        "dropout",
        "dtype",
        "init_weights_seed",
        "layers",
        "non_linearity",
        "orthogonality",
        "prefix_positions",
        "r",
        "subtract_projection",
        "suffix_positions",
        "tied_weights",
    }
)
_KEY = re.compile(
    rf"{MODULE}(?P<layer>\d{{1,5}})\.reft_layer\.refts\.{NAME}\.units\.(?P<place>[01])"
    r"\.(?P<part>learned_source\.weight|learned_source\.bias|projection\.weight|"
    r"projection\.parametrizations\.weight\.(?:original|0\.base))"
)


def read(saved: SavedAdapter, options: ConvertOptions) -> Converted:
    """The edits at block outputs. The option method is needed."""
    options.agreeing("phase", "prompt", "this converter: generated tokens are left alone")
    config = saved.config
    saved.check_settings(_REFT_FIELDS, {"output_reft": (True, "ReFT acts on a block's output")})
    saved.check_base(options.base)
    positions, stored_units, used_units = _positions(config, options)
    method = _method(config, options)
    activation = saved.activation(nullable=True)
    options.agreeing("activation", activation, CONFIG_FILE)
    r = field_of(config, CONFIG_FILE, "r", int, "the rank, a whole number")
    if not 1 <= r <= options.base.hidden_size:
        raise invalid(CONFIG_FILE, "r", r, f"1 to {options.base.hidden_size}")
    tensors = saved.read_tensors()
    prefixes = module_prefixes(
        tensors, _KEY, "…<layer>.reft_layer.refts.<name>.units.<0 or 1>.<part>"
    )
    found = sorted({layer for layer, _ in prefixes})
    _check_layers_listed(config, found, options)
    edits = {}
    for layer in found:
        for unit in range(stored_units):
            if (layer, str(unit)) not in prefixes:
                raise invalid(tensors.file, f"layer {layer}", "no such unit", f"unit {unit}")
            edit = _read_unit(
                tensors, prefixes[layer, str(unit)], options.base.hidden_size, r, method, activation
            )
            if unit in used_units:
                edits[EditKey(layer, "block_output", used_units.index(unit))] = edit
    tensors.finish()
    facts = rotation_facts(edits.values()) if method in _METHODS[True] else {}
    return assemble(edits, saved.conventions(method, positions, options, facts=facts), options)


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
        "method", allowed, f"{SOURCE} does not record whether the projection is subtracted"
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
