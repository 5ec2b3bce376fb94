"""The tensors of one unit, for each of pyreft's intervention classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from reft_core.convert.orthogonal import rebuild_orthogonal
from reft_core.convert.reading import invalid
from reft_core.convert.tensor_file import TensorFile, read_pickle
from reft_core.edits import Activation, Edit
from reft_core.errors import AdapterMismatch, explain


@dataclass(frozen=True)
class Kind:
    """One of pyreft's intervention classes: our method's name and how its file is read."""

    method: str
    has_activation: bool
    rank_key: str
    """Tensor whose first dimension is r."""
    read: Callable[[TensorFile, int, int, Activation], Edit]
    has_rotation: bool = True


def read_unit(path: Path, rank: int | None, kind: Kind, d: int, activation: Activation) -> Edit:
    """The edit in one ``intkey_`` file; ``rank`` is what the config says, if it does."""
    tensors = read_pickle(path)
    key = kind.rank_key
    dims, shape = (1, "(r,)") if key == "learned_source" else (2, f"(r, {d})")
    r = tensors.shape(key, dims, f"a {shape} tensor")[0]
    if rank is not None and r != rank:
        raise invalid(path.name, key, f"rank {r}", f"rank {rank}, as config.json says")
    if not 1 <= r <= d:
        raise invalid(path.name, key, f"rank {r}", f"a rank from 1 to {d}")
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


_LOREFT = Kind("loreft", True, "weight", _read_loreft)
KINDS: dict[str, Kind] = {
    "LoreftIntervention": _LOREFT,
    "LoreftIntervention_IdentityInit": _LOREFT,  # other numbers to begin with, saved alike
    "DireftIntervention": Kind("direft_orthonormal", True, "learned_source.weight", _read_direft),
    "NoreftIntervention": Kind("noreft", True, "learned_source.weight", _read_noreft, False),
    "NodireftIntervention": Kind("direft", True, "learned_source.weight", _read_nodireft, False),
    "ConsreftIntervention": Kind("consreft", False, "learned_source", _read_consreft),
    "LobireftIntervention": Kind("lobireft", False, "learned_source", _read_lobireft),
}
