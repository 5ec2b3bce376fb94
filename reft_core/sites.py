"""Finds where edits act in any transformers model, by structure and not by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
_UNBOUNDED = 1 << 20
"""Longest text of a model whose positions are relative, in tokens."""


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
    sites: Mapping[str, tuple[int, int]]
    """Input and output width of each site that a layer has."""
    rotary: tuple[float, ...] = field(default=(), compare=False)
    """Angle by which one position turns each pair of a head's halves; empty where it is not all
    there is to a position. Only a base described for conversion has it."""

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
        sites=site_sizes(find_layers(model)[0], config.hidden_size),
    )


def describe_seq2seq(model: PreTrainedModel, name: str) -> ModelDescription:
    """The description of an encoder-decoder as its adapters see it: by its encoder."""
    config = model.config
    encoder: Any = model.get_encoder()
    num_layers = getattr(config, "encoder_layers", None) or config.num_layers
    num_heads = config.num_attention_heads
    layers = find_layers(encoder, num_layers)
    return ModelDescription(
        name=name,
        architecture=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=num_layers,
        vocab_size=config.vocab_size,
        fingerprint=fingerprint(config),
        num_kv_heads=num_heads,
        head_dim=getattr(config, "d_kv", None) or config.hidden_size // num_heads,
        max_positions=getattr(config, "max_position_embeddings", None) or _UNBOUNDED,
        num_parameters=sum(p.numel() for p in model.parameters()),
        sites=site_sizes(layers[0], config.hidden_size),
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


def find_layers(model: PreTrainedModel, num_layers: int | None = None) -> list[nn.Module]:
    """The decoder layers, first to last; or an encoder's, where ``model`` is one.

    They are the members of the one ``ModuleList`` that has as many members as the config
    has layers (or ``num_layers``, where the config is not the layers' own), all of one class,
    each with parameters of its own. Raises :class:`UnsupportedModel` if no list, or more than
    one, fits.
    """
    expected = num_layers or model.config.get_text_config(decoder=True).num_hidden_layers
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


def site_sizes(layer: nn.Module, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Every site of a layer, with the widths of the site's input and output.

    ``linear:`` sites are named by their path inside the layer. A layer whose attention or
    MLP is not one module of its own lacks the sites that need it.
    """
    linears = {name: sizes for name, m in layer.named_modules() if (sizes := _linear_sizes(m))}
    square = (hidden_size, hidden_size)
    found = {"block_output": square}
    if (attention := _attention_name(layer)) is not None:
        found["attn_output"] = square
        projections = [n for n in linears if n.startswith(f"{attention}.")]
        found["heads"] = (hidden_size, linears[projections[-1]][0])
    if _mlp_name(layer) is not None:
        found["mlp_output"] = square
    return found | {f"linear:{name}": sizes for name, sizes in linears.items()}


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear map, None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # GPT-2's, with the weight the other way round
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _attention_name(layer: nn.Module) -> str | None:
    """The child that is transformers' self-attention: it knows its layer and has linears."""
    for name, child in layer.named_children():
        is_attention = hasattr(child, "layer_idx") and hasattr(child, "is_causal")
        if is_attention and any(_linear_sizes(module) for module in child.modules()):
            return name
    return None


def _mlp_name(layer: nn.Module) -> str | None:
    """The one other child that holds linear maps; None if there is not exactly one."""
    attention = _attention_name(layer)
    names = [
        name
        for name, child in layer.named_children()
        if name != attention and sum(1 for m in child.modules() if _linear_sizes(m)) >= 2
    ]
    return names[0] if attention is not None and len(names) == 1 else None


SiteEdit = Callable[[Tensor, Tensor], Tensor]
"""From a site's output h (..., d) and input x (..., d_x) to what replaces h."""


class Handles:
    """Several hook handles that are removed together."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Undo the hooks."""
        for handle in self._handles:
            handle.remove()


def edit_site(layer: nn.Module, site: str, edit: SiteEdit) -> Handles:
    """Hook ``layer`` so that ``edit`` replaces what ``site`` puts out; undo by ``remove()``.

    Sites are those of :func:`site_sizes`. Modules return h alone or first in a tuple and
    take x by position or by name, depending on the architecture.
    """
    if site == "heads":
        return _edit_heads(layer, edit)
    if site == "block_output":
        module = layer
    elif site.startswith("linear:"):
        module = layer.get_submodule(site.removeprefix("linear:"))
    else:
        name = _attention_name(layer) if site == "attn_output" else _mlp_name(layer)
        assert name is not None, f"{type(layer).__name__} has no {site}"
        module = layer.get_submodule(name)

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = _first_input(args, kwargs)
        if isinstance(output, tuple):
            return (edit(output[0], x), *output[1:])
        return edit(output, x)

    return Handles(module.register_forward_hook(hook, with_kwargs=True))


def _edit_heads(layer: nn.Module, edit: SiteEdit) -> Handles:
    """Edit the concatenated heads: h is the output projection's input, x the attention's."""
    name = _attention_name(layer)
    assert name is not None, f"{type(layer).__name__} has no heads"
    attention = layer.get_submodule(name)
    projection = [module for module in attention.modules() if _linear_sizes(module)][-1]
    attention_input: list[Tensor] = []

    def remember(_module: nn.Module, args: Any, kwargs: Any) -> None:
        attention_input[:] = [_first_input(args, kwargs)]

    def hook(_module: nn.Module, args: Any) -> Any:
        return (edit(args[0], attention_input.pop()), *args[1:])

    return Handles(
        attention.register_forward_pre_hook(remember, with_kwargs=True),
        projection.register_forward_pre_hook(hook),
    )


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states a module was called with."""
    tensor: Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor
