"""Prefix tuning and prompt tuning, as PEFT stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reft_core.adapter import Prefix
from reft_core.convert.assembling import kv_prefix
from reft_core.convert.peft.folder import CONFIG_FILE
from reft_core.convert.reading import field_of, invalid
from reft_core.convert.tensor_file import TensorFile
from reft_core.errors import AdapterMismatch, UnsupportedFeature, explain
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_PREFIX, PrefixSpec

_PROMPT_TENSOR = "prompt_embeddings"


def _num_virtual(config: Mapping[str, Any], facts: Mapping[str, int], base: str) -> int:
    """``num_virtual_tokens``, once ``facts`` agree with what the config records."""
    n = field_of(config, CONFIG_FILE, "num_virtual_tokens", int, "a whole number of tokens")
    if not 1 <= n <= MAX_PREFIX:
        raise invalid(CONFIG_FILE, "num_virtual_tokens", n, f"1 to {MAX_PREFIX}")
    submodules = config.get("num_transformer_submodules", 1)
    if submodules not in (None, 1):
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: num_transformer_submodules", submodules, "1, a decoder alone"
        )
    for key, expected in facts.items():
        if config.get(key) != expected:
            raise AdapterMismatch(
                explain(f"{CONFIG_FILE}: {key}", config.get(key), f"{expected}, as in {base}"),
                field=key,
            )
    return n


def read_prefix(
    config: Mapping[str, Any], tensors: TensorFile, base: ModelDescription
) -> tuple[PrefixSpec, Prefix]:
    """Keys and values of every layer."""
    heads, head_dim = base.num_kv_heads, base.head_dim
    facts = {
        "num_layers": base.num_layers,
        "token_dim": heads * head_dim,
        "num_attention_heads": heads,
    }
    n = _num_virtual(config, facts, base.name)
    rows = tensors.take(_PROMPT_TENSOR, (n, 2 * base.num_layers * heads * head_dim))
    tensors.finish()
    return kv_prefix(rows, base)


def read_prompt(
    config: Mapping[str, Any], tensors: TensorFile, base: ModelDescription
) -> tuple[PrefixSpec, Prefix]:
    """Embeddings before the prompt's."""
    n = _num_virtual(config, {"token_dim": base.hidden_size}, base.name)
    rows = tensors.take(_PROMPT_TENSOR, (n, base.hidden_size))
    tensors.finish()
    return PrefixSpec(kind="embedding", length=n), Prefix(embedding=rows)
