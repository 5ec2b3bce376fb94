"""Edits inside vLLM's forward: hooks on its layers, and the operator that the hooks call.

vLLM's layers put out the residual stream as two tensors, to be added by whoever reads them. An
edit acts on their sum, in float32, and its change is written into the first. What a step edits is
told by :func:`begin_step`; a step without edits, as every decode step, finds nothing to do.

Under ``torch.compile`` the call is ``reft::apply``, an operator that the compiler sees as one that
changes ``hidden``. Untested: on CUDA it is one of ``splitting_ops``, so that it runs between the
graphs of a prefill and is in no graph of a decode step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_core.batch import EditPlan, Place, RowEdit
from reft_core.kernels import apply_edits
from reft_core.vllm.layers import SiteModule

OPERATOR = "reft::apply"


@dataclass(frozen=True)
class PlacedEdits:
    """The edits of one site in one step, on the rows that any of them changes."""

    rows: Tensor
    """(K,) int64, unique."""
    edits: list[RowEdit]
    """With rows that count within ``rows``."""
    reads_input: bool


@dataclass
class Step:
    """What the running step edits, and which rows came to no number."""

    places: dict[Place, PlacedEdits]
    finite: list[tuple[Tensor, Tensor]]
    """Rows of each place that was edited, and whether their new states are finite, both (K,)."""

    def overflowed_rows(self) -> set[int]:
        """Rows that an edit would have made infinite or NaN; they were left as they were."""
        if not self.finite:
            return set()
        rows, finite = (torch.cat(parts) for parts in zip(*self.finite, strict=True))
        return set(rows[~finite].tolist())


_current = Step({}, [])
"""An operator has no other way to know: its arguments are those of the compiled graph. A process
runs one model, one step at a time."""


def begin_step(plan: EditPlan) -> Step:
    """Have the layers apply ``plan`` until :func:`end_step`."""
    _current.places = _placed(plan)
    _current.finite = []
    return _current


def end_step() -> None:
    """Have the layers apply nothing."""
    _current.places = {}


def _placed(plan: EditPlan) -> dict[Place, PlacedEdits]:
    """The plan, each place's rows gathered once. Layers of one adapter share their rows."""
    gathered: dict[tuple[int, ...], tuple[Tensor, list[Tensor]]] = {}
    found = {}
    for place, edits in plan.places.items():
        key = tuple(id(edit.rows) for edit in edits)
        if key not in gathered:
            joined = torch.cat([edit.rows for edit in edits])
            rows, inverse = torch.unique(joined, return_inverse=True)
            gathered[key] = rows, list(inverse.split([len(edit.rows) for edit in edits]))
        rows, within = gathered[key]
        placed = [
            RowEdit(edit.edit, local, edit.strength, edit.depth)
            for edit, local in zip(edits, within, strict=True)
        ]
        reads_input = any(edit.edit.source == "input" for edit in edits)
        found[place] = PlacedEdits(rows, placed, reads_input)
    return found


def apply_here(
    hidden: Tensor, residual: Tensor | None, x: Tensor | None, layer: int, site: str
) -> None:
    """Apply what the running step edits at a site to ``hidden`` (N, d), in place.

    ``residual`` (N, d) is what is added to it before anybody reads it, ``x`` (N, d_x) the site's
    input, if an edit may read that.
    """
    placed = _current.places.get((layer, site))
    if placed is None:
        return
    rows = placed.rows
    h = hidden.index_select(0, rows).float()  # (K, d)
    other = None if residual is None else residual.index_select(0, rows).float()
    if other is not None:
        h += other
    read = h
    if placed.reads_input:
        assert x is not None, "this site's input is known"
        read = x.index_select(0, rows)
    before = h.clone()
    apply_edits(h, read, placed.edits)
    # A row that overflows would spread: freed KV blocks are read again, masked but not skipped.
    finite = h.to(hidden.dtype).isfinite().all(1)  # (K,)
    h = torch.where(finite.unsqueeze(1), h, before)
    _current.finite.append((rows, finite))
    if other is not None:
        h -= other
    hidden.index_copy_(0, rows, h.to(hidden.dtype))


def _pretend(
    hidden: Tensor, residual: Tensor | None, x: Tensor | None, layer: int, site: str
) -> None:
    """:func:`apply_here` of tensors without values, for the compiler."""


_library = torch.library.Library("reft", "FRAGMENT")
_library.define("apply(Tensor(a!) hidden, Tensor? residual, Tensor? x, int layer, str site) -> ()")
_library.impl("apply", apply_here, dispatch_key="CPU")
_library.impl("apply", apply_here, dispatch_key="CUDA")
_library._register_fake("apply", _pretend)


def _apply(
    hidden: Tensor, residual: Tensor | None, x: Tensor | None, layer: int, site: str
) -> None:
    if torch.compiler.is_compiling():
        torch.ops.reft.apply(hidden, residual, x, layer, site)
    elif _current.places:
        apply_here(hidden, residual, x, layer, site)


def arm_site(found: SiteModule, layer: int, site: str) -> None:
    """Hook one site of one layer, for the life of the model."""
    if found.is_input:
        _arm_heads(found, layer, site)
        return
    columns = found.columns

    def hook(_module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        hidden, residual = output if isinstance(output, tuple) else (output, None)
        if site != "block_output":
            residual = None  # linear maps put out their bias beside
        if columns is not None:
            hidden = hidden[:, columns[0] : columns[1]]
        x = None if site == "block_output" else _input_of(args, kwargs)
        _apply(hidden, residual, x, layer, site)

    found.module.register_forward_hook(hook, with_kwargs=True)


def _arm_heads(found: SiteModule, layer: int, site: str) -> None:
    """Hook the concatenated heads: what the output projection reads."""
    seen: list[Tensor] = []

    def remember(_module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        seen[:] = [_input_of(args, kwargs)]

    def hook(_module: nn.Module, args: Any) -> None:
        _apply(args[0], None, seen.pop(), layer, site)

    assert found.attention is not None
    found.attention.register_forward_pre_hook(remember, with_kwargs=True)
    found.module.register_forward_pre_hook(hook)


def _input_of(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states a module was called with, among its positions and other arguments."""
    if "hidden_states" in kwargs:
        found: Tensor = kwargs["hidden_states"]
        return found
    return next(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
