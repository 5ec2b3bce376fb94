"""``config.json`` of a pyreft directory: which units there are, and the file of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_core.adapter import EditKey
from reft_core.convert.assembling import check_layers
from reft_core.convert.options import ConvertOptions
from reft_core.convert.pyreft.units import KINDS
from reft_core.convert.reading import field_of, invalid, read_json
from reft_core.spec import Site

CONFIG_FILE = "config.json"

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
class Unit:
    """One entry of ``representations``, with the file that holds its tensors."""

    key: EditKey
    rank: int | None
    class_name: str
    path: Path


def read_units(path: Path, files: Mapping[str, Path], options: ConvertOptions) -> list[Unit]:
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
            Unit(
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
    if not found or found[1] not in KINDS:
        raise invalid(file, where, type_name, "one of " + ", ".join(KINDS))
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
