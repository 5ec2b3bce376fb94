"""Settings of the edits: the method, and where its edits sit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from reft_core.edits import Activation
from reft_core.errors import InvalidRequest, TrainingError, explain
from reft_core.loading import LoadedModel
from reft_core.methods import METHODS
from reft_core.methods.placement import Placement
from reft_core.methods.virtual import VIRTUAL_METHODS, VirtualTokens
from reft_core.positions import PositionRule
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_LAYERS, MAX_PREFIX, MAX_RANK, PositionSpec
from reft_core.subspaces import MAX_SUBSPACES, check_subspaces, parse_ranks
from trainer.classify.config import HEAD_ONLY, HeadConfig
from trainer.config.base import Label, Positive, Settings, as_value_error
from trainer.nearest import nearest

_NonNegative = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]


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


class MethodSettings(Settings):
    """What is trained, and which layers and positions it edits."""

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
    scale: Positive | None = Field(
        default=None,
        description="fixed factor s of methods that have one; absent: the method's own",
    )
    alpha: Positive | None = Field(
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

    subspaces: dict[Label, Annotated[tuple[int, ...], BeforeValidator(_ranks)]] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_SUBSPACES,
        description="names for groups of ranks that a request may weigh, such as "
        "{tone: '0:2', topic: [2, 3]}; all ranks are trained together",
    )
    head: HeadConfig = Field(default=HeadConfig(), description="of an encoder")

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        known = [*METHODS, *VIRTUAL_METHODS, HEAD_ONLY]
        if value not in known:
            raise ValueError(f"no method{nearest(value, known)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        as_value_error(lambda: PositionRule.parse(self.positions))
        virtual = VIRTUAL_METHODS.get(self.method)
        if virtual is None and (given := self.changed("prefix_length", "prefix_bottleneck")):
            names = ", ".join(VIRTUAL_METHODS)
            raise ValueError(f"{given[0]} needs a method with virtual tokens: {names}")
        if virtual and virtual.kind == "embedding" and self.prefix_bottleneck is not None:
            raise ValueError("prefix_bottleneck makes keys and values, which prompt_tuning has not")
        edits = ("rank", "sites", "layers", "scale", "alpha", "activation", "phase", "subspaces")
        if self.intervention is None and (unused := self.changed(*edits)):
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
        """The method that edits states; None where virtual tokens or a head do all."""
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
