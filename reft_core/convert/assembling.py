"""From edits to our file: what every converter ends in.

A converter reads a foreign folder or file into edits, takes from the options what the source does
not record, and hands both to :func:`assemble`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from pydantic import ValidationError
from torch import Tensor

from reft_core.adapter import EditKey, Head, Prefix, encode_adapter
from reft_core.convert.options import ConvertOptions
from reft_core.convert.reading import invalid
from reft_core.edits import Edit, Part
from reft_core.errors import AdapterMismatch, InvalidRequest, explain
from reft_core.methods.base import Phase
from reft_core.sites import ModelDescription
from reft_core.spec import (
    AdapterSpec,
    HeadSpec,
    PositionSpec,
    PrefixSpec,
    Site,
    SiteSpec,
    TaskSpec,
    TemplateSpec,
    TrainingSpec,
)


@dataclass(frozen=True)
class Conventions:
    """What the edits themselves do not say, gathered from a source and the options."""

    method: str
    positions: PositionSpec
    template: TemplateSpec | None
    name: str
    tool: str
    file: str
    """Name of the file that the edits come from, for errors."""
    phase: Phase = "prompt"
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Kept in the file as provenance."""


@dataclass(frozen=True)
class Converted:
    """The result of a conversion, in our terms."""

    spec: AdapterSpec
    edits: Mapping[EditKey, Edit]
    prefix: Prefix | None = None
    head: Head | None = None

    def to_bytes(self) -> bytes:
        """The adapter file. Read back before it is returned."""
        return encode_adapter(self.spec, self.edits, self.prefix, self.head)


def check_layers(layers: Iterable[int], base: ModelDescription, file: str) -> None:
    """Raise :class:`AdapterMismatch` for a layer the base model does not have."""
    for layer in layers:
        if not 0 <= layer < base.num_layers:
            raise AdapterMismatch(
                explain(f"{file}: layer", layer, f"0 to {base.num_layers - 1}, as in {base.name}"),
                field="layer",
            )


def kv_prefix(rows: Tensor, base: ModelDescription) -> tuple[PrefixSpec, Prefix]:
    """Keys and values of every layer from ``rows`` (n, 2·layers·KH·D), one a virtual token.

    A row is key of layer 0, value of layer 0, key of layer 1, …
    """
    n, heads, head_dim = len(rows), base.num_kv_heads, base.head_dim
    halves = rows.view(n, 2 * base.num_layers, heads, head_dim).permute(1, 2, 0, 3)
    spec = PrefixSpec(kind="kv", length=n, num_kv_heads=heads, head_dim=head_dim)
    return spec, Prefix(tuple(halves[0::2]), tuple(halves[1::2]))  # each (KH, n, D)


def assemble(
    edits: Mapping[EditKey, Edit],
    conventions: Conventions,
    options: ConvertOptions,
    prefix: tuple[PrefixSpec, Prefix] | None = None,
    head: tuple[HeadSpec, Head] | None = None,
) -> Converted:
    """Spec and edits of our file, with one shape for all edits of a site."""
    uniform: dict[EditKey, Edit] = {}
    sites: dict[Site, SiteSpec] = {}
    prefix_spec, virtual = prefix or (None, None)
    head_spec, classifier = head or (None, None)
    task = TaskSpec()
    if head is None:
        options.not_used(("labels",), "the source has no classification head")
    try:
        for site in dict.fromkeys(key.site for key in edits):
            at_site = {key: edit for key, edit in edits.items() if key.site == site}
            sites[site], same_shape = _unify(at_site, conventions, options.base)
            uniform |= same_shape
        if head is not None:
            task = TaskSpec(kind="classification", labels=options.labels)
        spec = AdapterSpec(
            name=conventions.name,
            description=options.description,
            licence=options.licence,
            base=options.base.to_base_spec(),
            method=conventions.method,
            dtype=options.dtype,
            positions=conventions.positions,
            sites=sites,
            prefix=prefix_spec,
            head=head_spec,
            subspaces=None if options.subspaces is None else dict(options.subspaces),
            task=task,
            template=conventions.template,
            strength=options.strength,
            training=TrainingSpec(tool=conventions.tool, hyperparameters=dict(conventions.facts)),
        )
    except ValidationError as error:
        raise _as_option_error(error) from None
    return Converted(spec, uniform, virtual, classifier)


def _as_option_error(error: ValidationError) -> InvalidRequest:
    """What the spec refuses, as the option that it was made from."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # of several fields: the message names the field itself
        return InvalidRequest(message, field=message.partition(":")[0])
    where = ".".join(map(str, first["loc"]))
    return InvalidRequest(explain(where, first.get("input"), message), field=str(first["loc"][0]))


def _unify(
    edits: Mapping[EditKey, Edit], conventions: Conventions, base: ModelDescription
) -> tuple[SiteSpec, dict[EditKey, Edit]]:
    """One site's spec, and its edits padded to one rank.

    Padding adds zero columns to down and skip and zero rows to up: whatever the activation
    makes of such a column is multiplied by zero.
    """
    folded = {key: edit.fold() for key, edit in edits.items()}
    layers = tuple(sorted({key.layer for key in folded}))
    site, file = next(iter(folded)).site, conventions.file
    if site not in base.sites:
        raise AdapterMismatch(
            explain(f"{file}: site", site, f"one of {', '.join(base.sites)}, as in {base.name}"),
            field="site",
        )
    num_units = conventions.positions.to_rule().num_units
    for layer in layers:
        for unit in range(num_units):
            if EditKey(layer, site, unit) not in folded:
                raise invalid(
                    file, f"layer {layer}", f"units without {unit}", f"{num_units} units a layer"
                )
    forms = {
        (tuple(part for part, _ in edit.parts()), edit.activation, edit.scale, edit.source)
        for edit in folded.values()
    }
    if len(forms) != 1:
        raise invalid(file, "edits", sorted(map(str, forms)), "one form for all layers and units")
    parts, activation, scale, source = forms.pop()
    rank = max(edit.rank for edit in folded.values())
    in_size, out_size = base.sites[site]
    spec = SiteSpec(
        layers=layers,
        rank=rank,
        parts=parts,
        activation=activation,
        scale=scale,
        source=source,
        phase=conventions.phase,
        in_size=None if in_size == base.hidden_size else in_size,
        out_size=None if out_size == base.hidden_size else out_size,
    )
    return spec, {key: _pad(edit, rank) for key, edit in folded.items()}


def _pad(edit: Edit, rank: int) -> Edit:
    """The same edit with ``rank`` columns."""
    missing = rank - edit.rank
    if missing == 0 or edit.down is None or edit.up is None:
        return edit
    wide: dict[Part, Tensor] = {
        "down": torch.nn.functional.pad(edit.down, (0, missing)),
        "up": torch.nn.functional.pad(edit.up, (0, 0, 0, missing)),
    }
    if edit.skip is not None:
        wide["skip"] = torch.nn.functional.pad(edit.skip, (0, missing))
    if edit.bias is not None:
        wide["bias"] = torch.nn.functional.pad(edit.bias, (0, missing))
    return replace(edit, **wide)  # type: ignore[arg-type]
