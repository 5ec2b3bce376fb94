"""pyreft directories (pyreft 0.0.x and 0.1.0, saved by pyvene); ``export`` writes them.

A directory holds ``config.json``, one ``intkey_<key>.bin`` a unit, and ``pytorch_model.bin`` if
base parameters were trained (a classification head). Row vectors, R (d, r) orthonormal::

    LoreftIntervention     (act(hWᵀ + b) − hR)Rᵀ       weight, bias, rotate_layer
    DireftIntervention     act(hWᵀ + b)Rᵀ              learned_source.*, rotate_layer parametrised
    NoreftIntervention     (act(hW₁ᵀ + b) − hW₂ᵀ − c)W₂  learned_source.*, proj_layer.*
    NodireftIntervention   act(hW₁ᵀ + b)W₂             learned_source.*, proj_layer.*
    ConsreftIntervention   (s − hR)Rᵀ                  learned_source, rotate_layer parametrised
    LobireftIntervention   sRᵀ                         learned_source, rotate_layer parametrised

``LoreftIntervention_IdentityInit``, of pyreft after 0.1.0, is LoReFT with other numbers to begin
with. c is the projection's bias, present with ``add_bias``; NodiReFT stores it and never uses it.

Which tokens are edited, the activation and the prompt template are not in the directory.
"""

from __future__ import annotations

from pathlib import Path

from reft_core.convert.assembling import Conventions, Converted, assemble
from reft_core.convert.options import (
    ConvertOptions,
    ask_activation,
    ask_name,
    ask_positions,
    ask_template,
)
from reft_core.convert.orthogonal import rotation_facts
from reft_core.convert.pyreft.config import CONFIG_FILE, read_units
from reft_core.convert.pyreft.head import HEAD_FILE, read_head
from reft_core.convert.pyreft.units import KINDS, read_unit
from reft_core.convert.reading import find_file, invalid, list_folder
from reft_core.edits import Activation

METHODS = frozenset(kind.method for kind in KINDS.values())
"""The methods a pyreft directory can hold."""

_SOURCE = "a pyreft directory"


def from_pyreft(source: Path, options: ConvertOptions) -> Converted:
    """The adapter in a directory that pyreft saved.

    Needs the options positions, anchor, cap, template and name, and activation for the
    classes that have one. Whether a two-sided rule is tied follows from the units stored.
    """
    options.not_used(("layers",), "a pyreft directory records its layers")
    options.agreeing("phase", "prompt", "pyreft, which leaves generated tokens alone")
    files = list_folder(source)
    units = read_units(find_file(files, CONFIG_FILE, source=source), files, options)
    head = read_head(files[HEAD_FILE], options) if HEAD_FILE in files else None
    class_names = sorted({unit.class_name for unit in units})
    kinds = {KINDS[name] for name in class_names}
    if len(kinds) != 1:
        raise invalid(CONFIG_FILE, "intervention_types", class_names, "one class for all")
    (kind,) = kinds
    options.agreeing("method", kind.method, CONFIG_FILE)
    if kind.has_activation:
        activation: Activation = ask_activation(options, _SOURCE)
    else:
        activation = "identity"
        options.agreeing("activation", activation, f"the equation of {kind.method}")
    num_units = 1 + max(unit.key.unit for unit in units)
    positions = ask_positions(options, num_units, _SOURCE)
    d = options.base.hidden_size
    edits = {u.key: read_unit(u.path, u.rank, kind, d, activation) for u in units}
    conventions = Conventions(
        method=kind.method,
        positions=positions,
        template=ask_template(options, _SOURCE),
        name=ask_name(options, _SOURCE),
        tool="converted from pyreft",
        file=CONFIG_FILE,
        facts=rotation_facts(edits.values()) if kind.has_rotation else {},
    )
    return assemble(edits, conventions, options, head=head)
