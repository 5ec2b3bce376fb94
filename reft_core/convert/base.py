"""The base model an adapter is converted for, described from its config alone: no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.pytorch_utils import Conv1D

from reft_core.errors import UnsupportedModel, explain
from reft_core.loading import DEMO_MODEL, DEMO_NAME, ModelKind, model_kind, read_config
from reft_core.sites import ModelDescription, describe_model, describe_seq2seq, find_layers

_DEMO_CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Its shape, written down: reading it from the demo's package means de-quantising first."""

_CLASSES: dict[ModelKind, type] = {
    "causal": AutoModelForCausalLM,
    "encoder": AutoModel,
    "seq2seq": AutoModelForSeq2SeqLM,
}
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles do not depend on a text's length."""


def describe_config(config: PreTrainedConfig, name: str) -> ModelDescription:
    """The description of the model that ``config`` makes, as it is loaded to be served.

    Its modules are built on torch's meta device, which holds shapes and no numbers.
    """
    kind = model_kind(config)
    auto_class: Any = _CLASSES[kind]
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except ValueError:
        raise UnsupportedModel(
            explain("base", config.model_type, "a model type with a language model"), field="base"
        ) from None
    description = (describe_seq2seq if kind == "seq2seq" else describe_model)(model, name)
    return replace(description, rotary=_rotary(model, description.head_dim))


def _rotary(model: PreTrainedModel, head_dim: int) -> tuple[float, ...]:
    """The angles of a Llama's or Mistral's rotary embedding, if they are all that positions do.

    They are not where angles depend on a text's length, or a window hides what is far behind.
    """
    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding | MistralRotaryEmbedding):
            if module.rope_type not in _FIXED_ROPE or getattr(model.config, "sliding_window", None):
                return ()
            rebuilt = type(module)(module.config)  # the module's own are on the meta device
            angles = tuple(rebuilt.inv_freq.tolist())
            return angles if 2 * len(angles) == head_dim else ()
    return ()


def base_from_folder(model: str, name: str | None = None) -> ModelDescription:
    """The base model at a hub id or in a folder, or ``demo``, from its config alone."""
    if model == DEMO_MODEL:
        return describe_config(LlamaConfig(**_DEMO_CONFIG), name or DEMO_NAME)
    config = read_config(model)
    return describe_config(config, name or (Path(model).name if Path(model).is_dir() else model))


def layers_path(architecture: str, num_layers: int) -> tuple[str, frozenset[str]]:
    """Path of the layer list in models of this type, and the linear maps stored transposed.

    Such as ``model.layers`` and none, or ``transformer.h`` and GPT-2's ``attn.c_attn``, …
    """
    try:
        config = AutoConfig.for_model(architecture, num_hidden_layers=num_layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError):
        raise UnsupportedModel(
            explain("base.architecture", architecture, "a causal language model of transformers"),
            field="base.architecture",
        ) from None
    first = find_layers(model)[0]
    path = next(name for name, module in model.named_modules() if module is first)
    transposed = {name for name, module in first.named_modules() if isinstance(module, Conv1D)}
    return path.removesuffix(".0"), frozenset(transposed)
