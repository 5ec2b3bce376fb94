"""The adapter spec: everything an adapter file says about itself besides its tensors.

One JSON document, stored in the safetensors metadata under :data:`METADATA_KEY`. Unknown
keys are refused at every level, so a typo or a newer format is never silently ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from reft_core.edits import Activation, Part, Source
from reft_core.errors import InvalidRequest
from reft_core.positions import Anchor, Cap, PositionRule
from reft_core.subspaces import MAX_SUBSPACES, check_subspaces

FORMAT_VERSION = 1
METADATA_KEY = "reft"
MAX_LAYERS = 1024
MAX_RANK = 1024
MAX_SIZE = 1_048_576
MAX_PREFIX = 4096

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
AdapterName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
DIGEST_PATTERN = r"^[0-9a-f]{64}$"

SITE_PATTERN = r"^(block_output|attn_output|mlp_output|heads|linear:[A-Za-z0-9_.]{1,128})$"
Site = Annotated[str, StringConstraints(pattern=SITE_PATTERN)]
StorageDtype = Literal["float32", "float16", "bfloat16"]
_Short = Annotated[str, StringConstraints(max_length=256)]
# What databases are searched by; not all of them hold this character.
_Searched = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00]*$")]
_Text = Annotated[str, StringConstraints(max_length=8192)]
_Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]


class _Document(BaseModel):
    """A frozen part of the spec that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelSpec(_Document):
    """The base model an adapter was trained on."""

    name: _Searched = Field(description="hub id or folder name; for people, not compared")
    architecture: _Short = Field(description="transformers' model_type, such as 'llama'")
    hidden_size: int = Field(ge=1, le=65536)
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    vocab_size: int = Field(ge=1, le=4_194_304)
    fingerprint: Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)] = Field(
        description="SHA-256 of the config's shape-giving fields (reft_core.sites)"
    )


class SiteSpec(_Document):
    """The edits at one kind of site: where they sit and which tensors each has."""

    layers: tuple[int, ...] = Field(min_length=1, max_length=MAX_LAYERS)
    rank: int = Field(ge=0, le=MAX_RANK)
    parts: tuple[Part, ...] = Field(min_length=1)
    activation: Activation = "identity"
    scale: _Finite = 1.0
    source: Source = Field(default="output", description="what x is in the edit's formula")
    phase: Literal["prompt", "all"] = Field(
        default="prompt", description="'all': every generated token is edited too"
    )
    interchange: bool = Field(
        default=False, description="Δ = ((s − h)·upᵀ)·up with s from the request's source prompt"
    )
    in_size: int | None = Field(default=None, ge=1, le=MAX_SIZE, description="absent: hidden size")
    out_size: int | None = Field(default=None, ge=1, le=MAX_SIZE, description="absent: hidden size")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError("layers must be ascending, unique and at least 0")
        if len(set(self.parts)) != len(self.parts):
            raise ValueError("parts must be unique")
        low_rank = {"down", "up"} & set(self.parts)
        held = f"got {list(self.parts)} of rank {self.rank}"
        if low_rank and (len(low_rank) < 2 or self.rank < 1):
            raise ValueError(
                f"parts 'down' and 'up' come together and need a rank of at least 1, {held}"
            )
        if not low_rank and ({"skip", "bias"} & set(self.parts) or self.rank != 0):
            raise ValueError(f"parts 'skip' and 'bias', and a rank, need 'down' and 'up', {held}")
        plain = (self.activation, self.scale, self.source, self.phase)
        if self.interchange and (
            set(self.parts) != {"down", "up"} or plain != ("identity", 1.0, "output", "prompt")
        ):
            raise ValueError(
                "interchange needs parts 'down' and 'up' alone, activation 'identity', scale 1, "
                f"source 'output' and phase 'prompt', got {list(self.parts)}, {plain}"
            )
        return self

    def sizes(self, hidden_size: int) -> tuple[int, int]:
        """Widths of the site's input and output."""
        return self.in_size or hidden_size, self.out_size or hidden_size

    def shape(self, part: Part, hidden_size: int) -> tuple[int, ...]:
        """Shape of ``part`` for a model of this hidden size."""
        in_size, out_size = self.sizes(hidden_size)
        x_size = in_size if self.source == "input" else out_size
        shapes: dict[Part, tuple[int, ...]] = {
            "down": (x_size, self.rank),
            "skip": (x_size, self.rank),
            "up": (self.rank, out_size),
            "bias": (self.rank,),
            "shift": (out_size,),
            "gain": (out_size,),
        }
        return shapes[part]


class PrefixSpec(_Document):
    """Trained virtual tokens put before the prompt. They take positions 0..length-1.

    ``kv``: keys and values at every layer (prefix tuning). ``embedding``: input embeddings,
    which run through the model like tokens (prompt tuning).
    """

    kind: Literal["kv", "embedding"]
    length: int = Field(ge=1, le=MAX_PREFIX)
    num_kv_heads: int | None = Field(default=None, ge=1, le=MAX_SIZE, description="kind kv")
    head_dim: int | None = Field(default=None, ge=1, le=MAX_SIZE, description="kind kv")

    @model_validator(mode="after")
    def _sized(self) -> Self:
        sizes = (self.num_kv_heads, self.head_dim)
        expected = 2 if self.kind == "kv" else 0
        if sum(size is not None for size in sizes) != expected:
            raise ValueError("num_kv_heads and head_dim belong to kind 'kv', which needs both")
        return self

    def tensor_shapes(self, num_layers: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the prefix's tensors."""
        if self.kind == "embedding":
            return {"prefix.embedding": (self.length, hidden_size)}
        assert self.num_kv_heads is not None
        assert self.head_dim is not None
        shape = (self.num_kv_heads, self.length, self.head_dim)
        return {
            f"prefix.{layer}.{part}": shape
            for layer in range(num_layers)
            for part in ("key", "value")
        }


Pooling = Literal["first", "mean", "pooler"]


class HeadSpec(_Document):
    """A trained head on an encoder: pooling, a dense layer if any, then logits or one number.

    ``first`` pools the first token's state, ``mean`` the mean over the text's tokens, and
    ``pooler`` what the base model's own pooling layer makes of the first one.
    """

    pooling: Pooling = "first"
    hidden: int | None = Field(
        default=None, ge=1, le=MAX_SIZE, description="width of the dense layer; absent: none"
    )
    activation: Activation = Field(default="identity", description="after the dense layer")

    @model_validator(mode="after")
    def _activates_something(self) -> Self:
        if self.hidden is None and self.activation != "identity":
            raise ValueError(
                f"activation {self.activation!r} needs a dense layer: hidden is absent"
            )
        return self

    def tensor_shapes(self, hidden_size: int, num_outputs: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the head's tensors; they multiply row vectors from the right."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.hidden is not None:
            shapes["head.dense.weight"] = (hidden_size, self.hidden)
            shapes["head.dense.bias"] = (self.hidden,)
        shapes["head.out.weight"] = (self.hidden or hidden_size, num_outputs)
        shapes["head.out.bias"] = (num_outputs,)
        return shapes


class PositionSpec(_Document):
    """The position rule, spelt out with its conventions (see reft_core.positions)."""

    rule: Annotated[str, StringConstraints(max_length=32768)]
    tied: bool = True
    anchor: Anchor = "prompt_end"
    cap: Cap = "shared"

    @model_validator(mode="after")
    def _parses(self) -> Self:
        try:
            self.to_rule()
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        return self

    def to_rule(self) -> PositionRule:
        """The rule as an object that resolves positions."""
        return PositionRule.parse(self.rule, tied=self.tied, anchor=self.anchor, cap=self.cap)


class TemplateSpec(_Document):
    """How chat messages become the prompt text, in a form that cannot execute anything.

    The prompt is each message's text put in place of ``{content}`` in its role's line, in
    order, followed by ``generation``. Braces other than ``{content}`` are literal.
    """

    system: _Text = "{content}\n"
    user: _Text = "{content}\n"
    assistant: _Text = "{content}\n"
    generation: _Text = ""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        for role in ("system", "user", "assistant"):
            if getattr(self, role).count("{content}") != 1:
                raise ValueError(f"{role} must contain '{{content}}' exactly once")
        return self


class TaskSpec(_Document):
    """What the adapter is for.

    ``generation``: ``labels`` are the completions a labeller may answer. ``classification``:
    they are what the head's logits stand for, in order. ``regression``: there are none; the head
    puts out one number.
    """

    kind: Literal["generation", "classification", "regression"] = "generation"
    labels: tuple[_Short, ...] | None = Field(default=None, min_length=2, max_length=4096)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needed = {"generation": None, "classification": True, "regression": False}[self.kind]
        if needed is not None and (self.labels is not None) != needed:
            expected = "labels" if needed else "no labels"
            raise ValueError(f"labels: got {self.labels}, expected {expected} for {self.kind!r}")
        return self

    @property
    def num_outputs(self) -> int:
        """Numbers that a head puts out; 0 for a task without one."""
        if self.kind == "generation":
            return 0
        return 1 if self.labels is None else len(self.labels)


class TrainingSpec(_Document):
    """Provenance: how the adapter was made."""

    tool: _Short = ""
    command: _Text = ""
    created_at: _Short = Field(default="", description="UTC, ISO 8601")
    seed: int | None = None
    data: dict[_Short, _Short | int] = Field(default_factory=dict, max_length=64)
    hyperparameters: dict[_Short, _Short | int | _Finite | bool] = Field(
        default_factory=dict, max_length=64
    )
    metrics: dict[_Short, _Finite] = Field(default_factory=dict, max_length=64)


class AdapterSpec(_Document):
    """One adapter's spec. Round-trips exactly through ``to_json``/``from_json``."""

    format_version: Literal[1] = 1
    name: AdapterName
    description: _Text = ""
    licence: _Short = ""
    base: BaseModelSpec
    method: _Searched
    dtype: StorageDtype = "float32"
    positions: PositionSpec
    sites: dict[Site, SiteSpec] = Field(default_factory=dict, max_length=256)
    prefix: PrefixSpec | None = None
    head: HeadSpec | None = Field(
        default=None, description="for tasks of kind classification and regression"
    )
    subspaces: dict[_Short, tuple[int, ...]] | None = Field(
        default=None,
        max_length=MAX_SUBSPACES,
        description="named groups of ranks that a request may scale one by one",
    )
    task: TaskSpec = TaskSpec()
    template: TemplateSpec | None = Field(
        default=None, description="absent: the base model's own chat template"
    )
    strength: _Finite = Field(
        default=1.0, description="Δ is multiplied by it unless a request says"
    )
    training: TrainingSpec = TrainingSpec()

    @model_validator(mode="after")
    def _fits_its_base(self) -> Self:
        for name, site in self.sites.items():
            if site.layers[-1] >= self.base.num_layers:
                raise ValueError(
                    f"sites.{name}.layers: got {site.layers[-1]}, expected at most "
                    f"{self.base.num_layers - 1}"
                )
            if site.rank > min(site.sizes(self.base.hidden_size)):
                raise ValueError(
                    f"sites.{name}.rank: got {site.rank}, expected at most the site's width "
                    f"{min(site.sizes(self.base.hidden_size))}"
                )
        if not self.sites and self.prefix is None and self.head is None:
            raise ValueError("sites: got none, expected at least one site, a prefix or a head")
        num_ranks = min((site.rank for site in self.sites.values()), default=0)
        check_subspaces(self.subspaces or {}, num_ranks)
        if (self.task.kind == "generation") != (self.head is None):
            raise ValueError(
                f"head: got {self.head} for a task of kind {self.task.kind!r}, expected one for "
                "'classification' and 'regression' only"
            )
        if self.head is not None and self.prefix is not None:
            raise ValueError("prefix: got one beside a head, expected none on an encoder")
        if self.prefix is not None and self.strength != 1:
            raise ValueError(f"strength: got {self.strength}, expected 1 with a prefix")
        return self

    def iter_tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor the file must hold, and of no other, one by one.

        A short spec can imply millions: whoever reads a stranger's compares
        :attr:`num_tensors` first.
        """
        num_units = self.positions.to_rule().num_units
        for site_name, site in self.sites.items():
            of_parts = [(part, site.shape(part, self.base.hidden_size)) for part in site.parts]
            for layer in site.layers:
                for unit in range(num_units):
                    for part, shape in of_parts:
                        yield tensor_name(layer, site_name, unit, part), shape
        if self.prefix is not None:
            yield from self.prefix.tensor_shapes(
                self.base.num_layers, self.base.hidden_size
            ).items()
        if self.head is not None:
            shapes = self.head.tensor_shapes(self.base.hidden_size, self.task.num_outputs)
            yield from shapes.items()

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """:meth:`iter_tensor_shapes` as a dict."""
        return dict(self.iter_tensor_shapes())

    @property
    def num_tensors(self) -> int:
        """How many tensors :meth:`iter_tensor_shapes` names, counted without naming them."""
        num_units = self.positions.to_rule().num_units
        in_sites = sum(len(site.layers) * len(site.parts) for site in self.sites.values())
        in_prefix = 0
        if self.prefix is not None:
            in_prefix = 2 * self.base.num_layers if self.prefix.kind == "kv" else 1
        in_head = 0 if self.head is None else 4 if self.head.hidden is not None else 2
        return in_sites * num_units + in_prefix + in_head

    @property
    def num_parameters(self) -> int:
        """Numbers stored in the file's tensors."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def resident_bytes(self, num_bytes: int) -> int:
        """Bytes that a file of ``num_bytes`` takes in memory, where all tensors are float32."""
        return num_bytes if self.dtype == "float32" else 2 * num_bytes

    def to_json(self) -> str:
        """Compact JSON with sorted keys, so equal specs give equal bytes."""
        document = self.model_dump(mode="json")
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def tensor_name(layer: int, site: str, unit: int, part: Part) -> str:
    """Name of one tensor in the file: ``layers.{l}.{site}.{unit}.{part}``."""
    return f"layers.{layer}.{site}.{unit}.{part}"
