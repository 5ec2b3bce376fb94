"""What every converter shares: the options, hostile-input readers, and the way to our file.

A converter reads a foreign folder or file into edits, takes from the options what the source
does not record, and refuses to guess: a missing option is an error that names it and what it
may hold. Nothing from a source is executed. Torch pickles are opened with the restricted
unpickler, class names are text, and no path is built from what a file says.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from reft_core.adapter import MAX_ADAPTER_BYTES, EditKey, Head, Prefix, encode_adapter
from reft_core.edits import ACTIVATION_NAMES, Activation, Edit, Part
from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    AdapterTooLarge,
    InvalidRequest,
    explain,
)
from reft_core.methods.base import Phase
from reft_core.positions import Anchor, Cap, PositionRule
from reft_core.sites import ModelDescription
from reft_core.spec import (
    AdapterSpec,
    HeadSpec,
    PositionSpec,
    PrefixSpec,
    Site,
    SiteSpec,
    StorageDtype,
    TaskSpec,
    TemplateSpec,
    TrainingSpec,
)

MAX_CONFIG_BYTES = 1024 * 1024
MAX_FILES = 16384
BASE_TEMPLATE: Literal["base"] = "base"
"""The template option that means: the base model's own chat template."""


@dataclass(frozen=True)
class ConvertOptions:
    """What a source may not record. ``None`` means not given; a converter asks if it must.

    An option that the source does record may be left out, or must agree with it.
    """

    base: ModelDescription
    """The base model; ``base_from_folder`` makes one without loading weights."""
    name: str | None = None
    """The adapter's name; some sources bring one."""
    positions: str | None = None
    """The position rule, such as ``f7+l7`` (:mod:`reft_core.positions`)."""
    tied: bool | None = None
    anchor: Anchor | None = None
    cap: Cap | None = None
    method: str | None = None
    activation: Activation | None = None
    layers: tuple[int, ...] | None = None
    """Where to put a source that is one edit for any layer."""
    phase: Phase | None = None
    """Whether generated tokens are edited too, where a source leaves the choice."""
    template: TemplateSpec | Literal["base"] | None = None
    """How the prompt was written, or :data:`BASE_TEMPLATE`."""
    labels: tuple[str, ...] | None = None
    """What a classification head's outputs stand for, in order."""
    strength: float = 1.0
    dtype: StorageDtype = "float32"
    """What the tensors are stored in."""
    description: str = ""
    licence: str = ""

    def required(self, option: str, allowed: str, why: str) -> Any:
        """The option's value. Raises :class:`InvalidRequest` if it was not given."""
        value = getattr(self, option)
        if value is None:
            raise InvalidRequest.because(option, value, f"{allowed}; {why}")
        return value

    def agreeing(self, option: str, recorded: object, source: str) -> None:
        """Refuse an option that contradicts what ``source`` records."""
        value = getattr(self, option)
        if value is not None and value != recorded:
            raise InvalidRequest.because(option, value, f"{recorded!r}, as recorded in {source}")

    def not_used(self, options: Iterable[str], why: str) -> None:
        """Refuse options that mean nothing for this source."""
        for option in options:
            if getattr(self, option) is not None:
                raise InvalidRequest.because(option, getattr(self, option), f"nothing; {why}")


@dataclass(frozen=True)
class Conventions:
    """What the edits themselves do not say, gathered from a source and the options."""

    method: str
    positions: PositionSpec
    template: TemplateSpec | None
    name: str
    tool: str
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


# -- reading -----------------------------------------------------------------------------


def invalid(file: str, key: str, value: object, expected: str) -> AdapterFileInvalid:
    """The error for ``key`` of ``file`` holding ``value`` where ``expected`` was."""
    return AdapterFileInvalid(explain(f"{file}: {key}", value, expected), field=key)


def read_bytes(path: Path, max_bytes: int = MAX_ADAPTER_BYTES) -> bytes:
    """The file's bytes; its size is checked first."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise AdapterTooLarge(
                explain(path.name, f"{size} bytes", f"at most {max_bytes} bytes"), field=path.name
            )
        return path.read_bytes()
    except OSError as error:
        raise AdapterFileInvalid(
            f"{path}: cannot be read ({error.strerror})", field=path.name
        ) from None


def list_folder(folder: Path) -> dict[str, Path]:
    """The files of a folder by name. Converters look names up here and build no paths."""
    try:
        found = {path.name: path for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise AdapterFileInvalid(
            f"{folder}: got no readable folder ({error.strerror}), expected the folder that the "
            "other library saved",
            field="source",
        ) from None
    if len(found) > MAX_FILES:
        raise invalid(folder.name, "files", len(found), f"at most {MAX_FILES}")
    return found


def find_file(files: Mapping[str, Path], *names: str, source: Path) -> Path:
    """The one file of ``names`` that the folder has."""
    present = [name for name in names if name in files]
    if len(present) != 1:
        raise AdapterFileInvalid(
            f"{source}: got {present or sorted(files)[:8]}, expected exactly one of the files "
            + ", ".join(names),
            field="source",
        )
    return files[present[0]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; size and depth are bounded."""
    data = read_bytes(path, MAX_CONFIG_BYTES)
    return parse_json(data, path.name)


def parse_json(data: bytes, file: str) -> dict[str, Any]:
    """The JSON object in ``data``."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterFileInvalid(f"{file}: not valid JSON ({error})", field=file) from None
    if not isinstance(document, dict):
        raise invalid(file, "document", type(document).__name__, "a JSON object")
    return document


def field_of(document: Mapping[str, Any], file: str, key: str, kind: type, expected: str) -> Any:
    """``document[key]``, which must be of ``kind`` (a bool is not an int)."""
    value = document.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise invalid(file, key, value, expected)
    return value


class TensorFile:
    """The tensors of one foreign file, taken one by one; what is left over is an error."""

    def __init__(self, file: str, tensors: Mapping[str, object]) -> None:
        self.file = file
        self._left = dict(tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    @property
    def keys(self) -> list[str]:
        """Names not yet taken."""
        return sorted(self._left)

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``key``, checked and in float32.

        The shape is compared before any arithmetic: a pickle can describe a tensor of any
        size over a storage of a few bytes.
        """
        if key not in self._left:
            raise invalid(self.file, key, "no such key", f"a {shape} tensor")
        value = self._left.pop(key)
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise invalid(self.file, key, type(value).__name__, f"a {shape} tensor")
        if tuple(value.shape) != shape:
            raise invalid(self.file, key, f"shape {tuple(value.shape)}", f"shape {shape}")
        if not value.dtype.is_floating_point:
            raise invalid(self.file, key, str(value.dtype), "a floating-point dtype")
        tensor = value.detach().float().contiguous()
        if not torch.isfinite(tensor).all():
            raise invalid(self.file, key, "NaN or infinity", "finite values only")
        return tensor

    def shape(self, key: str, dims: int, expected: str) -> tuple[int, ...]:
        """Shape of the tensor ``key``, which must have ``dims`` dimensions."""
        value = self._left.get(key)
        if not isinstance(value, Tensor) or value.dim() != dims:
            held = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise invalid(self.file, key, held if key in self._left else None, expected)
        return tuple(value.shape)

    def take_int(self, key: str) -> int | None:
        """The whole number that ``key`` holds as a scalar tensor, or None without the key."""
        if key not in self._left:
            return None
        value = self._left.pop(key)
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_floating_point():
            held = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise invalid(self.file, key, held, "a tensor of one whole number")
        return int(value)

    def drop(self, key: str) -> None:
        """Forget an entry that no equation uses."""
        self._left.pop(key, None)

    def finish(self) -> None:
        """Raise if a tensor was not taken: it would be lost silently."""
        if self._left:
            raise AdapterFileInvalid(
                explain(f"{self.file}: keys", self.keys, "no further keys"), field=self.keys[0]
            )


def read_pickle(path: Path) -> TensorFile:
    """A state dict saved by ``torch.save``, without running anything it says.

    ``weights_only=True`` refuses every global but torch's own tensor constructors. What a
    zip archive would inflate to is bounded before it is opened.
    """
    read_bytes(path)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                inflated = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, OSError) as error:
            raise invalid(path.name, "file", str(error), "a torch.save archive") from None
        if inflated > MAX_ADAPTER_BYTES:
            raise AdapterTooLarge(
                explain(path.name, f"{inflated} bytes", f"at most {MAX_ADAPTER_BYTES} bytes"),
                field=path.name,
            )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise invalid(
            path.name,
            "file",
            f"{type(error).__name__}: {reason}",
            "a state dict of tensors saved by torch.save, loadable with weights_only=True",
        ) from None
    return _as_tensor_file(path.name, state)


def read_safetensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file."""
    data = read_bytes(path)
    try:
        return _as_tensor_file(path.name, safetensors.torch.load(data))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise invalid(path.name, "file", str(error), "a safetensors file") from None


def _as_tensor_file(file: str, state: object) -> TensorFile:
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise invalid(file, "content", type(state).__name__, "a dict from names to tensors")
    return TensorFile(file, state)


# -- the orthogonal parametrisation --------------------------------------------------------


def rebuild_orthogonal(source: TensorFile, prefix: str, d: int, r: int) -> Tensor:
    """R (d, r) from what ``torch.nn.utils.parametrizations.orthogonal`` saved under ``prefix``.

    Stored are X, ``original``, as (d, r), or as (r, d) where the weight itself lies down, and B
    (d, d), ``0.base``. For r < d, with A = tril(X, −1), the columns of A are Householder
    vectors: R = B · Π (I − τⱼ aⱼ aⱼᵀ) · diag(X), τⱼ = 2 / (1 + ‖aⱼ‖²), and the diagonal is
    truncated to integers, as torch does. For r = d torch takes the exponential map instead:
    R = B · exp(tril(X) − tril(X)ᵀ). Weight decay takes the diagonal below 1 and thereby a
    column of R to zero; the library then computes with that R, and so do we
    (:func:`rotation_error`).
    """
    original, base = f"{prefix}.original", f"{prefix}.0.base"
    lies_down = source.shape(original, 2, f"a ({d}, {r}) tensor")[0] != d
    x = source.take(original, (r, d) if lies_down else (d, r))
    if lies_down:
        x = x.mT
    if r == d:
        lower = x.tril()
        q = torch.matrix_exp(lower - lower.mT)
    else:
        a = x.tril(diagonal=-1)
        tau = 2.0 / (1.0 + (a * a).sum(dim=0))
        q = torch.linalg.householder_product(a, tau) * x.diagonal().int()
    return source.take(base, (d, d)) @ q  # (d, r)


def rotation_error(rotation: Tensor) -> float:
    """How far the columns of R (d, r) are from orthonormal: the largest entry of RᵀR − I."""
    gram = rotation.mT @ rotation
    return float((gram - torch.eye(gram.shape[0])).abs().max())


def rotation_facts(edits: Iterable[Edit]) -> dict[str, float]:
    """The provenance entry ``rotation_error``: near 0 unless training or rounding broke R.

    A converter keeps a broken R, because the source library computes with it too.
    """
    errors = [rotation_error(edit.up.mT) for edit in edits if edit.up is not None]
    return {"rotation_error": max(errors)} if errors else {}


# -- from edits to our file ------------------------------------------------------------------


def ask_activation(options: ConvertOptions, source: str) -> Activation:
    """The activation option, which ``source`` does not record."""
    value = options.required(
        "activation",
        "one of " + ", ".join(ACTIVATION_NAMES),
        f"{source} does not record it (its default is identity)",
    )
    if value not in ACTIVATION_NAMES:
        raise InvalidRequest.because("activation", value, "one of " + ", ".join(ACTIVATION_NAMES))
    activation: Activation = value
    return activation


def ask_positions(options: ConvertOptions, num_units: int, source: str) -> PositionSpec:
    """The position rule with its conventions, none of which ``source`` records.

    The number of parameter sets a site decides whether a two-sided rule is tied; the option
    may confirm it.
    """
    rule = options.required(
        "positions",
        "'fN', 'lN', 'fN+lM', 'prompt' or a list such as '0,3,-1'",
        f"{source} does not record which tokens it edits",
    )
    anchor = options.required(
        "anchor",
        "'prompt_end' (suffix positions count from the last prompt token) or 'before_last' "
        "(from the one before, as pyreft's Reft*Dataset classes do)",
        f"{source} does not record it",
    )
    cap = options.required(
        "cap",
        "'half' (each side takes at most half of a short prompt, as pyreft's "
        "get_intervention_locations does) or 'shared' (one side alone may take all of it)",
        f"{source} does not record it",
    )
    tied = num_units == 1
    spec = position_spec(rule, tied=tied, anchor=anchor, cap=cap)
    needed = spec.to_rule().num_units
    if needed != num_units:
        raise InvalidRequest.because(
            "positions", rule, f"a two-sided rule such as 'f2+l2': {source} has {num_units} units"
        )
    if options.tied is not None and options.tied != tied:
        held = "one unit" if tied else f"{num_units} units"
        raise InvalidRequest.because(
            "tied", options.tied, f"{tied}: {source} has {held} for each layer"
        )
    return spec


def position_spec(rule: str, *, tied: bool, anchor: Anchor, cap: Cap) -> PositionSpec:
    """The position part of a spec. Raises :class:`InvalidRequest` for a bad rule."""
    PositionRule.parse(rule)
    try:
        return PositionSpec(rule=rule, tied=tied, anchor=anchor, cap=cap)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0])
        raise InvalidRequest.because(option, first.get("input"), first["msg"]) from None


def whole_prompt(options: ConvertOptions, method: str, source: str) -> PositionSpec:
    """Positions of a method that reads the whole prompt, once the options agree with it."""
    recorded = {
        "method": method,
        "positions": "prompt",
        "tied": True,
        "anchor": "prompt_end",
        "cap": "shared",
    }
    for option, value in recorded.items():
        options.agreeing(option, value, f"{source} reads the whole prompt")
    return position_spec("prompt", tied=True, anchor="prompt_end", cap="shared")


def ask_template(options: ConvertOptions, source: str) -> TemplateSpec | None:
    """The template option, which ``source`` does not record; None is the base model's own."""
    value = options.required(
        "template",
        f"a prompt template, or {BASE_TEMPLATE!r} for the base model's own chat template",
        f"{source} does not record how its prompts were written",
    )
    if value == BASE_TEMPLATE:
        return None
    if not isinstance(value, TemplateSpec):
        raise InvalidRequest.because("template", value, f"a TemplateSpec or {BASE_TEMPLATE!r}")
    return value


def ask_name(options: ConvertOptions, source: str) -> str:
    """The name option, for sources that have no name of their own."""
    name: str = options.required(
        "name", "letters, digits, '.', '_' and '-'", f"{source} has no name"
    )
    return name


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
    for site in dict.fromkeys(key.site for key in edits):
        at_site = {key: edit for key, edit in edits.items() if key.site == site}
        sites[site], same_shape = _unify(at_site, conventions, options.base)
        uniform |= same_shape
    prefix_spec, virtual = prefix or (None, None)
    head_spec, classifier = head or (None, None)
    task = TaskSpec()
    if head is None:
        options.not_used(("labels",), "the source has no classification head")
    try:
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
            task=task,
            template=conventions.template,
            strength=options.strength,
            training=TrainingSpec(tool=conventions.tool, hyperparameters=dict(conventions.facts)),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0]) if first["loc"] else "spec"
        raise InvalidRequest(
            explain(".".join(map(str, first["loc"])) or "spec", first.get("input"), first["msg"]),
            field=option,
        ) from None
    return Converted(spec, uniform, virtual, classifier)


def _unify(
    edits: Mapping[EditKey, Edit], conventions: Conventions, base: ModelDescription
) -> tuple[SiteSpec, dict[EditKey, Edit]]:
    """One site's spec, and its edits padded to one rank.

    Padding adds zero columns to down and skip and zero rows to up: whatever the activation
    makes of such a column is multiplied by zero.
    """
    folded = {key: edit.fold() for key, edit in edits.items()}
    layers = tuple(sorted({key.layer for key in folded}))
    site = next(iter(folded)).site
    if site not in base.sites:
        raise AdapterMismatch(
            explain("site", site, f"one of {', '.join(base.sites)}, as in {base.name}"),
            field="site",
        )
    num_units = conventions.positions.to_rule().num_units
    for layer in layers:
        for unit in range(num_units):
            if EditKey(layer, site, unit) not in folded:
                raise AdapterFileInvalid(
                    explain(
                        f"layer {layer}", "units without " + str(unit), f"{num_units} units a layer"
                    ),
                    field="layers",
                )
    forms = {
        (tuple(part for part, _ in edit.parts()), edit.activation, edit.scale, edit.source)
        for edit in folded.values()
    }
    if len(forms) != 1:
        raise AdapterFileInvalid(
            explain("edits", sorted(map(str, forms)), "one form for all layers and units"),
            field="method",
        )
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


OPTION_NAMES = tuple(option.name for option in fields(ConvertOptions))
"""Every option, for a command line to offer."""
