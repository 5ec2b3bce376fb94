"""What one training run is told; :mod:`trainer.config_file` reads it from YAML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from reft_core.edits import Activation
from reft_core.errors import InvalidRequest, TrainingError, explain
from reft_core.loading import LoadedModel
from reft_core.methods import get_method
from reft_core.methods.placement import Placement
from reft_core.methods.virtual import VIRTUAL_METHODS, VirtualTokens
from reft_core.positions import PositionRule
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_LAYERS, MAX_PREFIX, MAX_RANK, AdapterName, PositionSpec, TemplateSpec
from reft_core.subspaces import MAX_SUBSPACES, check_subspaces, parse_ranks
from trainer.classify.config import HEAD_ONLY, HeadConfig
from trainer.metrics import METRICS

PATH_FIELDS = ("train", "valid", "test", "output", "report_dir")
"""Relative ones count from the YAML file's folder; in an override, from the current folder."""

_NonNegative = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Label = Annotated[str, StringConstraints(max_length=256)]


def _rule_text(value: object) -> object:
    """A list of positions in the grammar's explicit form; anything else unchanged."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(str(position) for position in value)
    return value


def _ranks(value: object) -> object:
    """A subspace written as text, as its ranks; a list of ranks unchanged."""
    if isinstance(value, int):  # YAML 1.1 reads 4:8 without quotes as 4 · 60 + 8
        raise ValueError("give a list of ranks, or quote the range: '4:8'")
    if isinstance(value, str):
        try:
            return parse_ranks(value)
        except InvalidRequest as error:
            raise ValueError(error.message) from None
    return value


class TrainConfig(BaseModel):
    """One training run. The defaults suit a labeller; only names and data must be given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(default="demo", description="'demo', a hub id, or a folder")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the frozen base; edits are float32 always"
    )
    name: AdapterName
    description: Annotated[str, StringConstraints(max_length=8192)] = ""
    licence: Annotated[str, StringConstraints(max_length=256)] = ""

    method: str = "loreft"
    rank: int = Field(default=4, ge=1, le=MAX_RANK)
    layers: (
        Annotated[str, StringConstraints(pattern=r"^(all|every:[1-9]\d{0,3})$")]
        | tuple[_NonNegative, ...]
    ) = Field(
        default="all",
        description="'all'; 'every:N', each Nth counted back from the last layer, which is "
        "always among them; or a list of layer numbers from 0",
    )
    positions: Annotated[str, BeforeValidator(_rule_text)] = Field(
        default="l1", description="rule of reft_core.positions, or a list of positions"
    )
    tied: bool = True
    scale: _Positive | None = Field(
        default=None,
        description="fixed factor s of methods that have one; absent: the method's own",
    )
    alpha: _Positive | None = Field(
        default=None, description="LoRA's way to state the scale: alpha over rank"
    )
    scaling: Literal["rank", "sqrt_rank"] = Field(
        default="rank",
        description="what alpha is divided by; 'sqrt_rank' is rank-stabilised (arXiv 2312.03732)",
    )
    prefix_length: int = Field(
        default=16,
        ge=1,
        le=MAX_PREFIX,
        description="virtual tokens of prefix_tuning, prompt_tuning and mam",
    )
    prefix_bottleneck: int | None = Field(
        default=None,
        ge=1,
        le=65_536,
        description="width of the MLP that makes keys and values while they are trained "
        "(arXiv 2101.00190, §4.3); absent: they are trained themselves",
    )
    activation: Activation | None = Field(default=None, description="absent: the method's own")
    sites: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="such as [block_output] or [linear:self_attn.q_proj]; absent: the method's own",
    )
    phase: Literal["prompt", "all"] | None = Field(
        default=None, description="'all' edits generated tokens too; absent: the method's own"
    )

    subspaces: dict[_Label, Annotated[tuple[int, ...], BeforeValidator(_ranks)]] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_SUBSPACES,
        description="names for groups of ranks that a request may weigh, such as "
        "{tone: '0:2', topic: [2, 3]}; all ranks are trained together",
    )

    head: HeadConfig = Field(default=HeadConfig(), description="of an encoder")

    template: TemplateSpec | None = Field(
        default=None, description="absent: the base model's own chat template"
    )
    system: str | None = Field(
        default=None, description="system message put before rows that have none"
    )
    labels: tuple[_Label, ...] | None = Field(
        default=None,
        min_length=2,
        max_length=4096,
        description="a labeller's answers; rows must hold one of them",
    )
    metrics: tuple[str, ...] = Field(default=("exact_match",), min_length=1)

    train: Path
    valid: Path = Field(description="chooses the epoch that is kept")
    test: Path | None = None

    epochs: int = Field(default=6, ge=1, le=10_000)
    batch_size: int = Field(default=16, ge=1, le=65_536)
    learning_rate: _Positive = 4e-3
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_ratio: _Fraction = 0.06
    weight_decay: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    max_grad_norm: _Positive = 1.0
    seed: int = Field(default=0, ge=0, lt=2**32)
    max_length: int | None = Field(
        default=None, ge=2, description="most tokens of a row; absent: the base's context"
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="in evaluation; absent: 8 more than the longest reference answer",
    )

    prefix_cache_mb: int = Field(
        default=4096, ge=0, description="memory for keys and values of unedited prompt beginnings"
    )

    output: Path = Field(
        default_factory=lambda data: Path("runs", data["name"], f"{data['name']}.safetensors"),
        description="adapter file to write; absent: in runs/NAME, from where the command is given",
    )
    report_dir: Path = Field(
        default_factory=lambda data: data["output"].parent,
        description="absent: the folder of the adapter file",
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in (*VIRTUAL_METHODS, HEAD_ONLY):
            _as_value_error(lambda: get_method(value))
        return value

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRICS:
                raise ValueError(f"{name!r} is no metric; known are {', '.join(METRICS)}")
        return value

    @field_validator("labels")
    @classmethod
    def _distinct_labels(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        stripped = [label.strip() for label in value or ()]
        if len(set(stripped)) != len(stripped) or "" in stripped:
            raise ValueError("labels must be distinct and not blank")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _as_value_error(lambda: PositionRule.parse(self.positions))
        virtual = VIRTUAL_METHODS.get(self.method)
        if virtual is None and (given := self._changed("prefix_length", "prefix_bottleneck")):
            names = ", ".join(VIRTUAL_METHODS)
            raise ValueError(f"{given[0]} needs a method with virtual tokens: {names}")
        if virtual and virtual.kind == "embedding" and self.prefix_bottleneck is not None:
            raise ValueError("prefix_bottleneck makes keys and values, which prompt_tuning has not")
        edits = ("rank", "sites", "layers", "scale", "alpha", "activation", "phase", "subspaces")
        if self.intervention is None and (unused := self._changed(*edits)):
            raise ValueError(f"{unused[0]} means nothing to {self.method}, which edits no state")
        if virtual and virtual.intervention and self.positions != "prompt":
            raise ValueError(f"{self.method} edits every token; positions must be 'prompt'")
        if self.scale is not None and self.alpha is not None:
            raise ValueError("scale and alpha say the same thing; give one of them")
        if self.alpha is None and self.scaling != "rank":
            raise ValueError("scaling says what alpha is divided by, and there is no alpha")
        if isinstance(self.layers, tuple):
            if not self.layers:
                raise ValueError("layers must name at least one layer")
            if list(self.layers) != sorted(set(self.layers)):
                raise ValueError("layers must be ascending and unique")
        return self

    def _changed(self, *names: str) -> list[str]:
        """Those settings that are not at their default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]

    @property
    def rule(self) -> PositionRule:
        """The prompt positions the adapter will edit."""
        return self.position_spec.to_rule()

    @property
    def position_spec(self) -> PositionSpec:
        """The position rule as the adapter file states it."""
        return PositionSpec(rule=str(PositionRule.parse(self.positions)), tied=self.tied)

    @property
    def fixed_scale(self) -> float | None:
        """s of Δ as ``scale`` or ``alpha`` give it; None leaves it to the method."""
        if self.alpha is None:
            return self.scale
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    @property
    def intervention(self) -> str | None:
        """The method that edits states; None where virtual tokens do all."""
        if self.method == HEAD_ONLY:
            return None
        virtual = VIRTUAL_METHODS.get(self.method)
        return self.method if virtual is None else virtual.intervention

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before every prompt."""
        return self.prefix_length if self.method in VIRTUAL_METHODS else 0

    def virtual_tokens(self, loaded: LoadedModel) -> VirtualTokens | None:
        """The untrained virtual tokens of the method, if it has any.

        Those that are embeddings begin as embeddings of random tokens (arXiv 2104.08691).
        Raises :class:`TrainingError` for a model whose attention slides past them.
        """
        virtual = VIRTUAL_METHODS.get(self.method)
        if virtual is None:
            return None
        if getattr(loaded.model.config, "sliding_window", None):
            raise TrainingError(
                explain("method", self.method, "one without virtual tokens: attention slides here"),
                field="method",
            )
        start = None
        if virtual.kind == "embedding":
            weights = loaded.model.get_input_embeddings().weight
            start = weights[torch.randint(len(weights), (self.prefix_length,))]
        return VirtualTokens(
            loaded.description,
            virtual.kind,
            self.prefix_length,
            bottleneck=self.prefix_bottleneck,
            start=start,
        )

    def placement(self, model: ModelDescription) -> Placement | None:
        """The method on its sites in ``model``, None where virtual tokens do all.

        Raises :class:`TrainingError` if it has no place there.
        """
        if self.intervention is None:
            return None
        try:
            placement = Placement.on(
                model,
                self.intervention,
                layers=self.layer_indices(model.num_layers),
                rank=self.rank,
                sites=self.sites,
                activation=self.activation,
                phase=self.phase,
                scale=self.fixed_scale,
            )
        except InvalidRequest as error:
            raise TrainingError(error.message, field=error.field) from None
        try:
            num_ranks = min(site.rank for site in placement.site_specs().values())
            check_subspaces(self.subspaces or {}, num_ranks)
        except ValueError as error:
            raise TrainingError(str(error), field="subspaces") from None
        return placement

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """The layers to edit in a model of ``num_layers``, ascending.

        ``every:N`` counts back from the last layer, so that ``every:3`` of 30 layers is
        2, 5, …, 29. Raises :class:`TrainingError` for a layer the model lacks.
        """
        if self.layers == "all":
            return tuple(range(num_layers))
        if isinstance(self.layers, str):
            step = int(self.layers.removeprefix("every:"))
            return tuple(sorted(range(num_layers - 1, -1, -step)))
        if self.layers[-1] >= num_layers:
            raise TrainingError(
                explain("layers", self.layers[-1], f"at most {num_layers - 1} for this model"),
                field="layers",
            )
        return self.layers


def _as_value_error(check: Callable[[], object]) -> None:
    """Run ``check``; our own error becomes the ValueError that pydantic expects."""
    try:
        check()
    except InvalidRequest as error:
        raise ValueError(error.message) from None
