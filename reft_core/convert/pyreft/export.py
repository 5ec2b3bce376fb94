"""Our adapters written as pyreft directories, where one of pyreft's classes has their form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from reft_core.adapter import Adapter
from reft_core.convert.exporting import check_plain, write_spec
from reft_core.convert.orthogonal import rotation_error
from reft_core.convert.pyreft.config import CONFIG_FILE, NAMED_SITES
from reft_core.edits import Edit
from reft_core.errors import UnsupportedFeature

_ORTHONORMAL = 1e-5
"""Largest entry of RᵀR − I at which R is written as a rotation."""

_COMPONENTS = {site: component for component, site in NAMED_SITES.items()}

State = dict[str, Tensor]


def to_pyreft(adapter: Adapter, folder: Path) -> str:
    """Write ``adapter`` as a pyreft directory; returns the name of the class it became.

    The class is the most constrained one that every edit fits: LoReFT if up's rows are
    orthonormal, LobiReFT for a constant vector, DiReFT or NoReFT with an activation, NodiReFT
    for any other low-rank edit. The default strength is multiplied in. Our spec goes into
    ``reft_serve.json``, since pyreft records neither positions nor activation.

    Raises :class:`UnsupportedFeature` for a form none of the six classes has.
    """
    spec = adapter.spec
    _check_form(adapter)
    edits = {key: _trim(edit.fold().times(spec.strength)) for key, edit in adapter.edits.items()}
    fitting = [name for name, write in _WRITERS if all(map(write, edits.values()))]
    if not fitting:
        form = next(iter(edits.values()))
        raise UnsupportedFeature.because(
            "method",
            f"{spec.method} with " + ", ".join(part for part, _ in form.parts()),
            "an edit that one of pyreft's six classes can express: down, up and bias (skip "
            "equal to upᵀ), or shift alone",
        )
    class_name = fitting[0]
    write = dict(_WRITERS)[class_name]
    folder.mkdir(parents=True, exist_ok=False)
    # pyreft numbers the units of a layer in this order: all prefixes, then all suffixes.
    keys = sorted(edits, key=lambda key: (key.unit, key.layer, key.site))
    names = [
        f"layer_{key.layer}_comp_{_COMPONENTS[key.site]}_unit_pos_nunit_1#{key.unit}"
        for key in keys
    ]
    ranks = []
    for key, name in zip(keys, names, strict=True):
        state = write(edits[key])
        assert state is not None
        ranks.append(_rank_of(state))
        torch.save(state, folder / f"intkey_{name}.bin")
    config = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": [spec.base.hidden_size] * len(keys),
        "intervention_types": [f"<class 'pyreft.interventions.{class_name}'>"] * len(keys),
        "mode": "parallel",
        "representations": [
            [key.layer, _COMPONENTS[key.site], "pos", 1, rank, *[None] * 9]
            for key, rank in zip(keys, ranks, strict=True)
        ],
        "sorted_keys": names,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    write_spec(spec, folder)
    return class_name


def _check_form(adapter: Adapter) -> None:
    """Raise :class:`UnsupportedFeature` for what no pyreft directory can say."""
    check_plain(adapter, "written for pyreft")
    for name, site in adapter.spec.sites.items():
        if name not in _COMPONENTS:
            raise UnsupportedFeature.because(
                "sites", name, f"some of {', '.join(_COMPONENTS)}, to be written for pyreft"
            )
        held = (site.phase, site.source)
        if held != ("prompt", "output"):
            raise UnsupportedFeature.because(
                f"sites.{name}", held, "phase 'prompt' and source 'output', as pyreft's edits"
            )


def _trim(edit: Edit) -> Edit:
    """The edit without ranks whose row of up is zero, such as padding; at least one is kept."""
    if edit.down is None or edit.up is None:
        return edit
    kept = edit.up.abs().amax(dim=1) > 0
    if not kept.any():
        kept[0] = True
    return replace(
        edit,
        down=edit.down[:, kept],
        up=edit.up[kept],
        skip=None if edit.skip is None else edit.skip[:, kept],
        bias=None if edit.bias is None else edit.bias[kept],
    )


def _rank_of(state: State) -> int:
    """The rank of a state dict that a writer made."""
    for key in ("weight", "learned_source.weight", "learned_source"):
        if key in state:
            return state[key].shape[0]
    raise AssertionError(sorted(state))


def _is_low_rank_only(edit: Edit) -> bool:
    return edit.down is not None and edit.shift is None and edit.gain is None


def _bias(edit: Edit) -> Tensor:
    return torch.zeros(edit.rank) if edit.bias is None else edit.bias.clone()


def _write_loreft(edit: Edit) -> State | None:
    """W = downᵀ + Rᵀ, R = upᵀ, for orthonormal rows of up."""
    if not _is_low_rank_only(edit) or edit.down is None or edit.up is None:
        return None
    if rotation_error(edit.up.mT) > _ORTHONORMAL:
        return None
    rotation = edit.up.mT
    if edit.activation == "identity":
        weight = (edit.down + rotation).mT
    elif edit.skip is not None and torch.allclose(edit.skip, rotation, atol=1e-6):
        weight = edit.down.mT
    else:
        return None
    return {
        "weight": weight.contiguous(),
        "bias": _bias(edit),
        "rotate_layer": rotation.contiguous(),
    }


def _write_lobireft(edit: Edit) -> State | None:
    """One direction: R = v/‖v‖ and s = ‖v‖."""
    if edit.down is not None or edit.gain is not None or edit.shift is None:
        return None
    length = edit.shift.norm()
    first = torch.eye(edit.shift.shape[0])[0]
    direction = edit.shift / length if length > 0 else first
    return {"learned_source": length[None].clone(), **_orthogonal_state(direction[:, None])}


def _write_direft(edit: Edit) -> State | None:
    if not _is_low_rank_only(edit) or edit.skip is not None or edit.up is None:
        return None
    if (
        edit.down is None
        or rotation_error(edit.up.mT) > _ORTHONORMAL
        or edit.rank == edit.down.shape[0]
    ):
        return None
    return {
        "learned_source.weight": edit.down.mT.contiguous(),
        "learned_source.bias": _bias(edit),
        **_orthogonal_state(edit.up.mT),
    }


def _write_noreft(edit: Edit) -> State | None:
    if not _is_low_rank_only(edit) or edit.up is None or edit.down is None or edit.skip is None:
        return None
    if not torch.allclose(edit.skip, edit.up.mT, atol=1e-6):
        return None
    return _write_projected(edit, edit.down, edit.up)


def _write_nodireft(edit: Edit) -> State | None:
    if not _is_low_rank_only(edit) or edit.up is None or edit.down is None or edit.skip is not None:
        return None
    return _write_projected(edit, edit.down, edit.up)


def _write_projected(edit: Edit, down: Tensor, up: Tensor) -> State:
    d = torch.tensor(down.shape[0])
    return {
        "embed_dim": d,
        "interchange_dim": d.clone(),
        "proj_layer.weight": up.contiguous(),
        "learned_source.weight": down.mT.contiguous(),
        "learned_source.bias": _bias(edit),
    }


def _orthogonal_state(rotation: Tensor) -> State:
    """R (d, r), r < d, in the parametrised form that DiReFT and LobiReFT are stored in.

    ``base`` is R completed to a square orthogonal matrix; ``original`` is −I, which torch's
    parametrisation maps to the identity.
    """
    d, r = rotation.shape
    q, upper = torch.linalg.qr(torch.cat([rotation, torch.eye(d)], dim=1))
    base = q * torch.where(upper.diagonal() < 0, -1.0, 1.0)  # QR may flip a column's sign
    base[:, :r] = rotation
    size = torch.tensor(d)
    return {
        "embed_dim": size,
        "interchange_dim": size.clone(),
        "rotate_layer.parametrizations.weight.original": -torch.eye(d, r),
        "rotate_layer.parametrizations.weight.0.base": base.contiguous(),
    }


_WRITERS: tuple[tuple[str, Callable[[Edit], State | None]], ...] = (
    ("LoreftIntervention", _write_loreft),
    ("LobireftIntervention", _write_lobireft),
    ("DireftIntervention", _write_direft),
    ("NoreftIntervention", _write_noreft),
    ("NodireftIntervention", _write_nodireft),
)
