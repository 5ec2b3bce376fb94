"""The slow truth: one request, one full forward a token, one loop over edited positions.

No KV cache, no batch, no plan, no folding of several rows into one product. Everything the
engine computes must equal this, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from reft_core.adapter import Adapter
from reft_core.edits import Edit, activate
from reft_core.loading import cache_argument
from reft_core.sites import find_layers

_PATHS = {
    "gpt2": {"attn_output": "attn", "mlp_output": "mlp", "heads": "attn.c_proj"},
    "gpt_neox": {"attn_output": "attention", "mlp_output": "mlp", "heads": "attention.dense"},
}
_DEFAULT_PATHS = {"attn_output": "self_attn", "mlp_output": "mlp", "heads": "self_attn.o_proj"}

Stack = Sequence[tuple[Adapter, float]]
"""Adapters with their strengths, in the order they act."""

Change = Callable[[Tensor, Tensor], None]
"""Changes a site's output in place, given its input."""


Factors = Mapping[int, float] | None
"""What each rank's contribution is multiplied by, 0 if it is left out; None: all by 1."""


def reference_delta(
    edit: Edit, h: Tensor, x: Tensor | None = None, factors: Factors = None
) -> Tensor:
    """Δ(h, x) of one hidden state (d,), written out as the canonical formula reads."""
    if edit.source == "output":
        x = h
    assert x is not None
    total = torch.zeros_like(h)
    if edit.down is not None and edit.up is not None:
        for j in range(edit.rank):
            inner = x @ edit.down[:, j]
            if edit.bias is not None:
                inner = inner + edit.bias[j]
            inner = activate(edit.activation, inner)
            if edit.skip is not None:
                inner = inner - x @ edit.skip[:, j]
            factor = 1 if factors is None else factors.get(j, 0)
            total = total + factor * edit.scale * inner * edit.up[j]
    if edit.shift is not None:
        total = total + edit.shift
    if edit.gain is not None:
        total = total + edit.gain * h
    return total


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel,
    tokens: list[int],
    prompt_len: int,
    adapter: Adapter | None = None,
    strength: float = 1.0,
    *,
    stack: Stack = (),
    sources: Mapping[str, Sequence[int]] = MappingProxyType({}),
    subspaces: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> Tensor:
    """Float32 logits (T, V) of ``tokens``, of which the first ``prompt_len`` are the prompt.

    ``stack`` takes the place of ``adapter`` and ``strength`` where there are several.
    ``sources`` holds the source prompt of interchange adapters, by digest, and ``subspaces`` the
    chosen factors of named subspaces.
    """
    stack = stack or ([(adapter, strength)] if adapter is not None else [])
    prefixed = [used for used, factor in stack if factor]
    # Rows of the forward: cached keys and values have none, virtual embeddings have theirs.
    virtual = sum(used.num_virtual_tokens for used in prefixed if not used.has_kv_prefix)
    late: list[tuple[nn.Module, str, Change]] = []
    for used, factor in stack:
        units = used.rule.resolve(prompt_len)
        factors = _rank_factors(used, subspaces.get(used.digest))
        for key, edit in used.edits.items():
            positions = list(units[key.unit])
            is_last_unit = key.unit == len(units) - 1
            if used.spec.sites[key.site].phase == "all" and is_last_unit:
                positions += range(prompt_len, len(tokens))
            rows = [virtual + position for position in positions]
            layer = find_layers(model)[key.layer]
            if used.digest in sources and used.spec.sites[key.site].interchange:
                source = list(sources[used.digest])
                states = _site_output(model, layer, key.site, source)
                pairs = zip(rows, used.rule.resolve(len(source))[key.unit], strict=True)
                paired = {row: states[at] for row, at in pairs}
                change = _interchange(edit, factor, paired, factors)
                late.append((layer, key.site, change))
                continue
            late.append((layer, key.site, _change(edit, factor, rows, factors)))
    handles = [handle for place in late for handle in _hook(model, *place)]
    try:
        return _forward(model, tokens, prefixed)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference_encode(
    encoder: PreTrainedModel,
    tokens: list[int],
    stack: Stack,
    num_layers: int,
    segments: list[int] | None = None,
) -> Any:
    """An encoder's own output for one text, or a pair told by ``segments``, edited row by row."""
    handles = []
    for used, factor in stack:
        units = used.rule.resolve(len(tokens))
        for key, edit in used.edits.items():
            layer = find_layers(encoder, num_layers)[key.layer]
            change = _change(edit, factor, list(units[key.unit]))
            handles += _hook(encoder, layer, key.site, change)
    try:
        beside = {} if segments is None else {"token_type_ids": torch.tensor([segments])}
        return encoder(input_ids=torch.tensor([tokens]), **beside)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference_classify(
    model: PreTrainedModel, tokens: list[int], stack: Stack, segments: list[int] | None = None
) -> Tensor:
    """Logits (L,) of one text under an encoder, its pooling and its head written out."""
    (headed,) = [used for used, _ in stack if used.head is not None]
    assert headed.head is not None
    assert headed.spec.head is not None
    output = reference_encode(model, tokens, stack, model.config.num_hidden_layers, segments)
    states = output.last_hidden_state[0]
    if headed.spec.head.pooling == "mean":
        pooled = sum(states[i] for i in range(len(tokens))) / len(tokens)
    else:
        pooled = states[0] if headed.spec.head.pooling == "first" else output.pooler_output[0]
    head = headed.head
    if head.dense_weight is not None:
        pooled = activate(head.activation, pooled @ head.dense_weight + head.dense_bias)
    return pooled @ head.out_weight + head.out_bias


@torch.no_grad()
def reference_seq2seq(
    model: Any, tokens: list[int], max_tokens: int, stack: Stack, num_layers: int
) -> list[int]:
    """Greedy answer of an encoder-decoder; the decoder reads all of it anew for every token."""
    encoded = reference_encode(model.get_encoder(), tokens, stack, num_layers)
    answer: list[int] = []
    for _ in range(max_tokens):
        read = torch.tensor([[model.config.decoder_start_token_id, *answer]])
        logits = model(encoder_outputs=encoded, decoder_input_ids=read, use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == model.generation_config.eos_token_id:
            break
        answer.append(token)
    return answer


def _forward(model: PreTrainedModel, tokens: list[int], adapters: list[Adapter]) -> Tensor:
    """Logits at ``tokens``, with the adapters' virtual tokens standing before them."""
    ids = torch.tensor([tokens])
    for adapter in adapters:
        prefix = adapter.prefix
        if prefix is None:
            continue
        if prefix.embedding is not None:
            embeds = torch.cat([prefix.embedding, model.get_input_embeddings()(ids[0])])
            return (
                model(inputs_embeds=embeds[None], use_cache=False)
                .logits[0]
                .float()[adapter.num_virtual_tokens :]
            )
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(key[None], value[None], layer)
        return model(input_ids=ids, **cache_argument(model, cache)).logits[0].float()
    return model(input_ids=ids, use_cache=False).logits[0].float()


def _rank_factors(adapter: Adapter, chosen: Mapping[str, float] | None) -> Factors:
    """The factor of each rank when ``chosen`` subspaces are named; the others are off."""
    if chosen is None:
        return None
    ranks = adapter.spec.subspaces or {}
    return {rank: factor for name, factor in chosen.items() for rank in ranks[name]}


def _change(edit: Edit, strength: float, rows: list[int], factors: Factors = None) -> Change:
    """Edit ``rows`` of a site's output, one after the other."""

    def change(hidden: Tensor, x: Tensor) -> None:
        for row in rows:
            h = hidden[0, row]
            hidden[0, row] = h + strength * reference_delta(edit, h, x[0, row], factors)

    return change


def _interchange(
    edit: Edit, strength: float, states: Mapping[int, Tensor], factors: Factors = None
) -> Change:
    """Put what ``states`` (d,) hold in the edit's subspace in place, row by row."""
    assert edit.up is not None
    rotation = edit.up.mT  # (d, r)
    weights = torch.ones(edit.rank)
    if factors is not None:
        weights = torch.tensor([factors.get(j, 0.0) for j in range(edit.rank)])

    def change(hidden: Tensor, _x: Tensor) -> None:
        for row, s in states.items():
            h = hidden[0, row]
            hidden[0, row] = h + strength * (((s - h) @ rotation) * weights) @ rotation.mT

    return change


def _site_output(model: PreTrainedModel, layer: nn.Module, site: str, tokens: list[int]) -> Tensor:
    """What a site puts out (T, d) when the base model reads ``tokens``."""
    seen: list[Tensor] = []
    handles = _hook(model, layer, site, lambda hidden, _x: seen.append(hidden[0].clone()))
    try:
        _forward(model, tokens, [])
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


def _hook(model: PreTrainedModel, layer: nn.Module, site: str, change: Change) -> list[Any]:
    """Have ``change`` work on a site's output and input, both (1, T, d)."""
    paths = _PATHS.get(model.config.model_type, _DEFAULT_PATHS)

    def given(args: Any, kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    if site == "heads":
        seen: dict[str, Tensor] = {}
        attention = layer.get_submodule(paths["attn_output"])
        projection = layer.get_submodule(paths["heads"])
        return [
            attention.register_forward_pre_hook(
                lambda _m, args, kwargs: seen.update(x=given(args, kwargs)), with_kwargs=True
            ),
            projection.register_forward_pre_hook(lambda _m, args: change(args[0], seen["x"])),
        ]
    if site == "block_output":
        module = layer
    elif site.startswith("linear:"):
        module = layer.get_submodule(site.removeprefix("linear:"))
    else:
        module = layer.get_submodule(paths[site])

    def after(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        change(output[0] if isinstance(output, tuple) else output, given(args, kwargs).clone())
        return output

    return [module.register_forward_hook(after, with_kwargs=True)]


def reference_generate(
    model: PreTrainedModel,
    prompt: tuple[int, ...],
    max_tokens: int,
    adapter: Adapter | None = None,
    strength: float = 1.0,
    *,
    stack: Stack = (),
    sources: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> list[int]:
    """Greedy continuation of ``prompt``; the whole sequence is recomputed for every token."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits = reference_logits(
            model, tokens, len(prompt), adapter, strength, stack=stack, sources=sources
        )
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]
