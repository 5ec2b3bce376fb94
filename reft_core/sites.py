"""Finds where edits act in any transformers model, by structure and not by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from reft_core.errors import UnsupportedModel
from reft_core.spec import BaseModelSpec

_FINGERPRINT_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)


@dataclass(frozen=True)
class ModelDescription:
    """The facts about a loaded base model that adapters and the engine depend on."""

    name: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    fingerprint: str
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Longest sequence its position encoding was made for."""
    num_parameters: int

    def to_base_spec(self) -> BaseModelSpec:
        """How an adapter trained on this model names it."""
        return BaseModelSpec(
            name=self.name,
            architecture=self.architecture,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            vocab_size=self.vocab_size,
            fingerprint=self.fingerprint,
        )


def describe_model(model: PreTrainedModel, name: str) -> ModelDescription:
    """The description of ``model``, read from its config and module tree."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads
    return ModelDescription(
        name=name,
        architecture=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        fingerprint=fingerprint(config),
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        max_positions=config.max_position_embeddings,
        num_parameters=sum(p.numel() for p in model.parameters()),
    )


def fingerprint(config: PreTrainedConfig) -> str:
    """SHA-256 of the config fields that give the model its shape.

    Only integers enter: float fields (norm epsilon, rotary base) differ in the last digit
    between a model and its quantised copy, for which the same adapter is meant.
    """
    facts: dict[str, Any] = {"model_type": config.model_type}
    facts |= {field: getattr(config, field, None) for field in _FINGERPRINT_FIELDS}
    num_heads = facts["num_attention_heads"]
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or num_heads
    facts["head_dim"] = facts["head_dim"] or facts["hidden_size"] // num_heads
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, first to last.

    They are the members of the one ``ModuleList`` that has as many members as the config
    has layers, all of one class, each with parameters of its own. Raises
    :class:`UnsupportedModel` if no list, or more than one, fits.
    """
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    fitting = {name: layers for name, layers in lists.items() if _is_stack(layers, expected)}
    outermost = {
        name: layers
        for name, layers in fitting.items()
        if not any(name.startswith(f"{other}.") for other in fitting)
    }
    if len(outermost) != 1:
        seen = ", ".join(f"{name} ({len(layers)} members)" for name, layers in lists.items())
        problem = f"found {len(outermost)}" if outermost else "found none"
        raise UnsupportedModel(
            f"{type(model).__name__}: looked for one ModuleList of {expected} alike layers (the "
            f"config's num_hidden_layers), {problem}; its lists are: {seen or 'none'}"
        )
    return list(next(iter(outermost.values())))


def _is_stack(layers: nn.ModuleList, expected: int) -> bool:
    """Whether a list looks like a model's layers."""
    return (
        len(layers) == expected
        and len({type(layer) for layer in layers}) == 1
        and all(any(True for _ in layer.parameters()) for layer in layers)
    )


def edit_output(layer: nn.Module, edit: Callable[[Tensor], Tensor]) -> Any:
    """Hook ``layer`` so that ``edit`` replaces its hidden-state output; returns the handle.

    Layers return the hidden states (1 or B, T, d) alone or first in a tuple, depending on
    the architecture and on the transformers version. ``handle.remove()`` undoes it.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return layer.register_forward_hook(hook)
