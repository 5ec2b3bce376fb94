"""What can be found out about an adapter without running its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reft_core.adapter import Adapter, EditKey
from reft_core.batch import AdapterUse, PromptEdits
from reft_core.edits import Edit, activate
from reft_core.positions import PositionRule
from reft_core.spec import tensor_name


def is_zero(edit: Edit) -> bool:
    """Whether the edit's own tensors say that Δ is 0 for every state."""
    for part in (edit.shift, edit.gain):
        if part is not None and bool(part.any()):
            return False
    if edit.down is None or edit.up is None or edit.scale == 0:
        return True
    edit = edit.fold()
    assert edit.down is not None
    assert edit.up is not None
    bias = torch.zeros(edit.rank) if edit.bias is None else edit.bias
    alive = edit.down.any(dim=0) | (activate(edit.activation, bias) != 0)
    if edit.skip is not None:
        alive = alive | edit.skip.any(dim=0)
    return not bool((alive & edit.up.any(dim=1)).any())


@dataclass(frozen=True)
class DeadEdits:
    """Edits that change no answer."""

    zero: tuple[EditKey, ...]
    """Those whose Δ is 0."""
    switched_off: bool
    """Whether the default strength is 0, so that a request must give another for any edit."""
    unread: Mapping[EditKey, tuple[int, int]]
    """Last-layer edits with positions nothing reads: how many of how many."""
    prompt_len: int
    """The prompt that :attr:`unread` was counted on."""


def dead_edits(adapter: Adapter, prompt_len: int | None = None) -> DeadEdits:
    """Dead edits on a prompt of ``prompt_len`` tokens, or else on one that fits the rule."""
    prompt_len = prompt_len or _roomy_length(adapter.rule)
    reads: Literal["last", "all"] = "last" if adapter.head is None else "all"
    edits = PromptEdits((AdapterUse(adapter),), prompt_len, reads)
    unread = {}
    for key in adapter.edits:
        edited, live = edits.positions[0][key.unit], edits.live_positions(0, key)
        if len(live) < len(edited):
            unread[key] = (len(edited) - len(live), len(edited))
    zero = tuple(key for key, edit in adapter.edits.items() if is_zero(edit))
    return DeadEdits(zero, adapter.spec.strength == 0, unread, prompt_len)


def _roomy_length(rule: PositionRule) -> int:
    """A prompt length at which a rule edits all the positions it names."""
    furthest = max((abs(position) + 1 for position in rule.explicit), default=0)
    return 2 * max(rule.first, rule.last, furthest, 16)


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of two adapters differs."""

    name: str
    largest: float | None
    """Largest |a − b|; None if only one has the tensor, or their shapes differ."""
    relative: float | None
    """That over the largest |a| or |b|."""
    note: str = ""


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor by its name in the file."""
    found = {
        tensor_name(key.layer, key.site, key.unit, part): tensor
        for key, edit in adapter.edits.items()
        for part, tensor in edit.parts()
    }
    found |= {} if adapter.prefix is None else adapter.prefix.tensors()
    return found | ({} if adapter.head is None else adapter.head.tensors())


def tensor_differences(a: Adapter, b: Adapter) -> list[TensorDifference]:
    """The tensors that are not equal: those of one side only, then by relative difference."""
    ours, theirs = tensors_of(a), tensors_of(b)
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None:
            found.append(
                TensorDifference(name, None, None, f"only in {'A' if one is not None else 'B'}")
            )
        elif one.shape != other.shape:
            shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
            found.append(TensorDifference(name, None, None, shapes))
        elif not torch.equal(one, other):
            largest = float((one.double() - other.double()).abs().max())
            size = max(float(one.double().abs().max()), float(other.double().abs().max()))
            found.append(TensorDifference(name, largest, largest / size))
    return sorted(found, key=lambda entry: entry.relative or torch.inf, reverse=True)


def spec_differences(a: Adapter, b: Adapter) -> list[tuple[str, Any, Any]]:
    """Dotted field, value in A and value in B, of every field of the specs that differs."""
    ours = dict(_flat(a.spec.model_dump(mode="json")))
    theirs = dict(_flat(b.spec.model_dump(mode="json")))
    fields = dict.fromkeys([*ours, *theirs])
    return [
        (field, ours.get(field), theirs.get(field))
        for field in fields
        if ours.get(field) != theirs.get(field)
    ]


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects, lists left whole."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
