"""Finds where edits act in a model as vLLM builds it: its layers of this rank, and their sites.

vLLM fuses what transformers keeps apart (q, k and v are one linear map, and so are gate and up).
An adapter's sites carry transformers' names; here they become a module and columns of its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from reft_core.errors import UnsupportedModel

PROVED_MODEL_TYPES = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)
"""Whose layers put out the residual stream, as one tensor or as two to be added."""


@dataclass(frozen=True)
class SiteModule:
    """Where one site of a layer is: a module, and the columns of its output that are the site's."""

    module: nn.Module
    columns: tuple[int, int] | None = None
    """First and end, or None for all."""
    is_input: bool = False
    """The site is what the module reads (``heads``), and not what it puts out."""
    attention: nn.Module | None = None
    """Of ``heads``: the attention whose input is the site's."""


def local_layers(model: nn.Module, num_layers: int) -> dict[int, nn.Module]:
    """The decoder layers that this pipeline rank has, by their number in the whole model.

    Raises :class:`UnsupportedModel` unless exactly one list of modules looks like them.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    if type(model).__name__.startswith("Transformers"):
        raise UnsupportedModel(
            f"{type(model).__name__}: vLLM has no implementation of its own of this model, and "
            "that of transformers shapes its states otherwise"
        )
    found: dict[str, dict[int, nn.Module]] = {}
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or len(modules) != num_layers:
            continue
        if any(name.startswith(f"{other}.") for other in found):
            continue
        here = {i: m for i, m in enumerate(modules) if not isinstance(m, PPMissingLayer)}
        alike = len({type(layer) for layer in here.values()}) == 1
        if alike and all(any(True for _ in layer.parameters()) for layer in here.values()):
            found[name] = here
    if len(found) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__}: looked for one list of {num_layers} alike layers, found "
            f"{len(found)}"
        )
    return next(iter(found.values()))


def find_site(model: nn.Module, layer: nn.Module, site: str) -> SiteModule:
    """Where ``site`` is in ``layer``. Raises :class:`UnsupportedModel` if it has none."""
    if site == "block_output":
        return SiteModule(layer)
    attention = _attention_name(layer)
    if site == "attn_output" and attention:
        return SiteModule(layer.get_submodule(attention))
    if site == "mlp_output" and (mlp := _mlp_name(layer, attention)):
        return SiteModule(layer.get_submodule(mlp))
    if site == "heads" and attention:
        inside = layer.get_submodule(attention)
        projections = [module for module in inside.modules() if _is_linear(module)]
        return SiteModule(projections[-1], is_input=True, attention=inside)
    if site.startswith("linear:"):
        found = _find_linear(model, layer, site.removeprefix("linear:"))
        if found is not None:
            return found
    raise UnsupportedModel(f"{type(layer).__name__}: has no {site} that vLLM keeps apart")


def _find_linear(model: nn.Module, layer: nn.Module, path: str) -> SiteModule | None:
    """A linear map by its path in transformers, maybe as columns of a fused one."""
    from vllm.model_executor.utils import get_packed_modules_mapping

    parent_path, _, name = path.rpartition(".")
    try:
        parent = layer.get_submodule(parent_path)
    except AttributeError:
        return None
    module = getattr(parent, name, None)
    if isinstance(module, nn.Module) and _is_linear(module):
        return SiteModule(module)
    for fused, members in get_packed_modules_mapping(model).items():
        module = getattr(parent, fused, None)
        if name not in members or not isinstance(module, nn.Module):
            continue
        sizes: Any = getattr(module, "output_sizes", None)
        if sizes is not None and len(sizes) == len(members):
            first = sum(sizes[: members.index(name)])
            return SiteModule(module, (first, first + sizes[members.index(name)]))
    return None


def _is_linear(module: nn.Module) -> bool:
    from vllm.model_executor.layers.linear import LinearBase

    return isinstance(module, LinearBase)


def _attention_name(layer: nn.Module) -> str | None:
    """The child that holds vLLM's attention."""
    from vllm.model_executor.layers.attention import Attention

    for name, child in layer.named_children():
        if any(isinstance(module, Attention) for module in child.modules()):
            return name
    return None


def _mlp_name(layer: nn.Module, attention: str | None) -> str | None:
    """The one other child that holds linear maps; None if there is not exactly one."""
    names = [
        name
        for name, child in layer.named_children()
        if name != attention and sum(1 for module in child.modules() if _is_linear(module)) >= 2
    ]
    return names[0] if len(names) == 1 else None
