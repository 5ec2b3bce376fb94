"""pyreft directories (pyreft 0.0.x and 0.1.0, saved by pyvene); pyreft_export writes them.

A directory holds ``config.json``, one ``intkey_<key>.bin`` a unit, and ``pytorch_model.bin`` if
base parameters were trained (a classification head). Row vectors, R (d, r) orthonormal::

    LoreftIntervention     (act(hWᵀ + b) − hR)Rᵀ       weight, bias, rotate_layer
    DireftIntervention     act(hWᵀ + b)Rᵀ              learned_source.*, rotate_layer parametrised
    NoreftIntervention     (act(hW₁ᵀ + b) − hW₂ᵀ − c)W₂  learned_source.*, proj_layer.*
    NodireftIntervention   act(hW₁ᵀ + b)W₂             learned_source.*, proj_layer.*
    ConsreftIntervention   (s − hR)Rᵀ                  learned_source, rotate_layer parametrised
    LobireftIntervention   sRᵀ                         learned_source, rotate_layer parametrised

c is the projection's bias, present with ``add_bias``; NodiReFT stores it and never uses it.

Which tokens are edited, the activation and the prompt template are not in the directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from reft_core.adapter import EditKey, Head
from reft_core.convert.common import (
    Conventions,
    Converted,
    ConvertOptions,
    TensorFile,
    ask_activation,
    ask_name,
    ask_positions,
    ask_template,
    assemble,
    check_layers,
    field_of,
    find_file,
    invalid,
    list_folder,
    read_json,
    read_pickle,
    rebuild_orthogonal,
    rotation_facts,
)
from reft_core.edits import Activation, Edit
from reft_core.errors import AdapterMismatch, InvalidRequest, UnsupportedFeature, explain
from reft_core.spec import HeadSpec, Site

CONFIG_FILE = "config.json"
HEAD_FILE = "pytorch_model.bin"

_SOURCE = "a pyreft directory"
_REPRESENTATION = (
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)
_UNSUPPORTED_FIELDS = (
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)
_CLASS = re.compile(r"(?:<class ')?(?:[\w.]+\.)?(\w+)(?:'>)?")
_LAYER_PATH = re.compile(r"[\w.]*?\[(\d+)\]\.(\w+(?:\.\w+)*)")
NAMED_SITES: dict[str, Site] = {
    "block_output": "block_output",
    "attention_output": "attn_output",
    "mlp_output": "mlp_output",
}
"""Our site for each of pyvene's component names."""
_PATH_SITES: dict[str, Site] = {
    "output": "block_output",
    "self_attn.output": "attn_output",
    "attn.output": "attn_output",
    "mlp.output": "mlp_output",
}


@dataclass(frozen=True)
class _Kind:
    """One of pyreft's intervention classes: our method's name and how its file is read."""

    method: str
    has_activation: bool
    rank_key: str
    """Tensor whose first dimension is r."""
    read: Callable[[TensorFile, int, int, Activation], Edit]
    has_rotation: bool = True


@dataclass(frozen=True)
class _Unit:
    """One entry of ``representations``, with the file that holds its tensors."""

    key: EditKey
    rank: int | None
    class_name: str
    path: Path


def from_pyreft(source: Path, options: ConvertOptions) -> Converted:
    """The adapter in a directory that pyreft saved.

    Needs the options positions, anchor, cap, template and name, and activation for the
    classes that have one. Whether a two-sided rule is tied follows from the units stored.
    """
    options.not_used(("layers",), "a pyreft directory records its layers")
    options.agreeing("phase", "prompt", "pyreft, which leaves generated tokens alone")
    files = list_folder(source)
    units = _read_units(find_file(files, CONFIG_FILE, source=source), files, options)
    head = _read_head(files[HEAD_FILE], options) if HEAD_FILE in files else None
    class_names = {unit.class_name for unit in units}
    if len(class_names) != 1:
        raise invalid(CONFIG_FILE, "intervention_types", sorted(class_names), "one class for all")
    kind = _KINDS[class_names.pop()]
    options.agreeing("method", kind.method, CONFIG_FILE)
    if kind.has_activation:
        activation = ask_activation(options, _SOURCE)
    else:
        activation = "identity"
        options.agreeing("activation", activation, f"the equation of {kind.method}")
    num_units = 1 + max(unit.key.unit for unit in units)
    positions = ask_positions(options, num_units, _SOURCE)
    d = options.base.hidden_size
    edits = {unit.key: _read_unit(unit, kind, d, activation) for unit in units}
    conventions = Conventions(
        method=kind.method,
        positions=positions,
        template=ask_template(options, _SOURCE),
        name=ask_name(options, _SOURCE),
        tool="converted from pyreft",
        facts=rotation_facts(edits.values()) if kind.has_rotation else {},
    )
    return assemble(edits, conventions, options, head=head)


def _read_head(path: Path, options: ConvertOptions) -> tuple[HeadSpec, Head] | None:
    """The classification head among the parameters that were trained beside the units.

    pyreft's trainer always writes this file, mostly empty. RoBERTa's head is a dense layer,
    tanh and a projection on the first token's state; BERT's projects the model's own pooler.
    Anything else in the file is a trained base parameter, which no adapter holds.
    """
    tensors = read_pickle(path)
    d, key = options.base.hidden_size, "classifier.weight"
    dense = key not in tensors
    if dense:
        key = "classifier.out_proj.weight"
    if key not in tensors:
        if tensors.keys:
            raise UnsupportedFeature.because(
                path.name, tensors.keys, "no trained parameters but a classification head"
            )
        return None
    num_labels = tensors.shape(key, 2, f"a (labels, {d}) tensor")[0]
    labels = options.required(
        "labels", f"the {num_labels} names of the head's classes", f"{_SOURCE} does not record them"
    )
    if len(labels) != num_labels:
        raise InvalidRequest.because("labels", labels, f"{num_labels} names, one a class")
    layers: dict[str, Tensor] = {}
    if dense:
        layers["dense_weight"] = tensors.take("classifier.dense.weight", (d, d)).mT.contiguous()
        layers["dense_bias"] = tensors.take("classifier.dense.bias", (d,))
    layers["out_weight"] = tensors.take(key, (num_labels, d)).mT.contiguous()
    layers["out_bias"] = tensors.take(key.replace("weight", "bias"), (num_labels,))
    tensors.finish()
    activation: Activation = "tanh" if dense else "identity"
    spec = HeadSpec(
        pooling="first" if dense else "pooler", hidden=d if dense else None, activation=activation
    )
    return spec, Head(**layers, activation=activation)


# -- config.json -----------------------------------------------------------------------------


def _read_units(path: Path, files: Mapping[str, Path], options: ConvertOptions) -> list[_Unit]:
    """Every unit the config names, each with its file; a file without a unit is an error."""
    config = read_json(path)
    file = path.name
    mode = config.get("mode", "parallel")
    if mode != "parallel":
        raise invalid(file, "mode", mode, "'parallel'")
    rows = field_of(config, file, "representations", list, "a list of interventions")
    types = field_of(config, file, "intervention_types", list, "a list of class names")
    if not rows or len(types) != len(rows):
        raise invalid(
            file, "intervention_types", f"{len(types)} names", f"{len(rows)}, one a representation"
        )
    counts: dict[str, int] = {}
    per_site: dict[tuple[int, str], int] = {}
    units = []
    for index, (row, type_name) in enumerate(zip(rows, types, strict=True)):
        fields = _representation(row, file, f"representations[{index}]")
        layer, site = _place(fields, file, f"representations[{index}]")
        class_name = _class_name(type_name, file, f"intervention_types[{index}]")
        stem = _key_stem(fields)
        number = counts.get(stem, 0)
        counts[stem] = number + 1
        unit = per_site.get((layer, site), 0)
        per_site[layer, site] = unit + 1
        units.append(
            _Unit(
                EditKey(layer, site, unit),
                fields["low_rank_dimension"],
                class_name,
                _unit_file(files, fields, number, file),
            )
        )
    check_layers((unit.key.layer for unit in units), options.base, file)
    if max(per_site.values()) > 2 or len(set(per_site.values())) != 1:
        raise invalid(
            file,
            "representations",
            {f"layer {layer}": count for (layer, _), count in per_site.items()},
            "one unit a layer (tied or one-sided), or two (prefix and suffix)",
        )
    named = {unit.path.name for unit in units}
    extra = sorted(n for n in files if n.startswith("intkey_") and n not in named)
    if extra:
        raise invalid(file, "representations", f"none for {extra}", "one for every intkey_ file")
    return units


def _representation(row: Any, file: str, where: str) -> dict[str, Any]:
    """One entry of ``representations`` by field name; its length varies by version."""
    if isinstance(row, list) and 2 <= len(row) <= len(_REPRESENTATION):
        fields = dict(zip(_REPRESENTATION, row, strict=False))
    elif isinstance(row, dict) and set(row) <= set(_REPRESENTATION):
        fields = dict(row)
    else:
        raise invalid(
            file, where, row, f"a list of 2 to {len(_REPRESENTATION)} fields: layer, component, …"
        )
    fields = dict.fromkeys(_REPRESENTATION) | {"unit": "pos", "max_number_of_units": 1} | fields
    if fields["unit"] != "pos":
        raise invalid(file, f"{where}.unit", fields["unit"], "'pos'")
    for name in _UNSUPPORTED_FIELDS:
        if fields[name] is not None and fields[name] is not False:
            raise invalid(file, f"{where}.{name}", fields[name], "null (not supported)")
    rank = fields["low_rank_dimension"]
    if rank is not None and (type(rank) is not int or rank < 1):
        raise invalid(file, f"{where}.low_rank_dimension", rank, "a whole number from 1, or null")
    return fields


def _place(fields: Mapping[str, Any], file: str, where: str) -> tuple[int, Site]:
    """Layer and site of a representation, from pyvene's component name or module path."""
    component = fields["component"]
    layer: Any = fields["layer"]
    site = None
    if isinstance(component, str) and len(component) <= 256:
        if component.startswith("base_model."):
            raise invalid(
                file, f"{where}.component", component, "a base model that PEFT has not wrapped"
            )
        site = NAMED_SITES.get(component)
        path = _LAYER_PATH.fullmatch(component)
        if path:
            layer, site = int(path[1]), _PATH_SITES.get(path[2])
    if site is None:
        raise invalid(
            file,
            f"{where}.component",
            component,
            "one that acts at " + ", ".join(NAMED_SITES.values()) + ", such as 'block_output' or "
            "'model.layers[3].output'",
        )
    if type(layer) is not int:
        raise invalid(file, f"{where}.layer", layer, "a whole number")
    return layer, site


def _class_name(type_name: Any, file: str, where: str) -> str:
    """Name of an intervention's class, out of text like ``<class 'a.b.C'>``."""
    found = _CLASS.fullmatch(type_name) if isinstance(type_name, str) else None
    if not found or found[1] not in _KINDS:
        raise invalid(file, where, type_name, "one of " + ", ".join(_KINDS))
    return found[1]


def _key_stem(fields: Mapping[str, Any]) -> str:
    """A unit's key without its number, in the present style.

    pyvene numbers units by this text; units of different components never share one.
    """
    component, count = fields["component"], fields["max_number_of_units"]
    where = f"comp_{component.replace('.', '_')}_unit_pos_nunit_{count}"
    return where if "." in component else f"layer_{fields['layer']}_{where}"


def _unit_file(
    files: Mapping[str, Path], fields: Mapping[str, Any], number: int, file: str
) -> Path:
    """The file of a representation's unit, under whichever key style saved it.

    Since February 2025 keys have underscores, because a ModuleDict takes no dots. Before, a
    module path kept its dots; still older versions wrote dots throughout, and ``repr``.
    """
    component, layer = fields["component"], fields["layer"]
    count = fields["max_number_of_units"]
    stems = [_key_stem(fields)]
    place = "" if "." in component else f"layer_{layer}_"
    stems.append(f"{place}comp_{component}_unit_pos_nunit_{count}")
    place = place.replace("_", ".")
    stems += [f"{place}{word}.{component}.unit.pos.nunit.{count}" for word in ("comp", "repr")]
    stems = list(dict.fromkeys(stems))
    names = [f"intkey_{stem}#{number}.bin" for stem in stems]
    present = [name for name in names if name in files]
    if len(present) != 1:
        raise invalid(
            file, "representations", present or None, "exactly one file of " + repr(names)
        )
    return files[present[0]]


# -- one unit's tensors ------------------------------------------------------------------------


def _read_unit(unit: _Unit, kind: _Kind, d: int, activation: Activation) -> Edit:
    """The edit in one ``intkey_`` file."""
    tensors = read_pickle(unit.path)
    key = kind.rank_key
    dims, shape = (1, "(r,)") if key == "learned_source" else (2, f"(r, {d})")
    r = tensors.shape(key, dims, f"a {shape} tensor")[0]
    if unit.rank is not None and r != unit.rank:
        raise invalid(unit.path.name, key, f"rank {r}", f"rank {unit.rank}, as {CONFIG_FILE} says")
    if not 1 <= r <= d:
        raise invalid(unit.path.name, key, f"rank {r}", f"a rank from 1 to {d}")
    _drop_sizes(tensors, d)
    edit = kind.read(tensors, d, r, activation)
    tensors.finish()
    return edit


def _drop_sizes(tensors: TensorFile, d: int) -> None:
    """Forget pyvene's two bookkeeping buffers, once they agree with the base model."""
    for key in ("embed_dim", "interchange_dim"):
        value = tensors.take_int(key)
        if value is not None and value != d:
            raise AdapterMismatch(
                explain(f"{tensors.file}: {key}", value, f"{d}, the base model's hidden size"),
                field=key,
            )


def _read_loreft(tensors: TensorFile, d: int, r: int, activation: Activation) -> Edit:
    rotation = tensors.take("rotate_layer", (d, r))
    return Edit(
        down=tensors.take("weight", (r, d)).mT,
        skip=rotation,
        up=rotation.mT,
        bias=tensors.take("bias", (r,)),
        activation=activation,
    )


def _read_direft(tensors: TensorFile, d: int, r: int, activation: Activation) -> Edit:
    return Edit(
        down=tensors.take("learned_source.weight", (r, d)).mT,
        up=rebuild_orthogonal(tensors, "rotate_layer.parametrizations.weight", d, r).mT,
        bias=tensors.take("learned_source.bias", (r,)),
        activation=activation,
    )


def _read_noreft(tensors: TensorFile, d: int, r: int, activation: Activation) -> Edit:
    projection = tensors.take("proj_layer.weight", (r, d))
    edit = Edit(
        down=tensors.take("learned_source.weight", (r, d)).mT,
        skip=projection.mT,
        up=projection,
        bias=tensors.take("learned_source.bias", (r,)),
        activation=activation,
    )
    if "proj_layer.bias" not in tensors:
        return edit
    subtracted = tensors.take("proj_layer.bias", (r,))
    if activation == "identity" and edit.bias is not None:
        return replace(edit, bias=edit.bias - subtracted)
    return replace(edit, shift=-(subtracted @ projection))  # −c·W₂ is the same for every h


def _read_nodireft(tensors: TensorFile, d: int, r: int, activation: Activation) -> Edit:
    tensors.drop("proj_layer.bias")  # stored with add_bias, used by no equation
    return Edit(
        down=tensors.take("learned_source.weight", (r, d)).mT,
        up=tensors.take("proj_layer.weight", (r, d)),
        bias=tensors.take("learned_source.bias", (r,)),
        activation=activation,
    )


def _read_consreft(tensors: TensorFile, d: int, r: int, activation: Activation) -> Edit:
    rotation = rebuild_orthogonal(tensors, "rotate_layer.parametrizations.weight", d, r)
    return Edit(down=-rotation, up=rotation.mT, bias=tensors.take("learned_source", (r,)))


def _read_lobireft(tensors: TensorFile, d: int, r: int, activation: Activation) -> Edit:
    rotation = rebuild_orthogonal(tensors, "rotate_layer.parametrizations.weight", d, r)
    return Edit(shift=rotation @ tensors.take("learned_source", (r,)))


_KINDS: dict[str, _Kind] = {
    "LoreftIntervention": _Kind("loreft", True, "weight", _read_loreft),
    "DireftIntervention": _Kind("direft_orthonormal", True, "learned_source.weight", _read_direft),
    "NoreftIntervention": _Kind("noreft", True, "learned_source.weight", _read_noreft, False),
    "NodireftIntervention": _Kind("direft", True, "learned_source.weight", _read_nodireft, False),
    "ConsreftIntervention": _Kind("consreft", False, "learned_source", _read_consreft),
    "LobireftIntervention": _Kind("lobireft", False, "learned_source", _read_lobireft),
}
METHODS = frozenset(kind.method for kind in _KINDS.values())
"""The methods a pyreft directory can hold."""
