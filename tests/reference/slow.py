"""The slow truth: one request, one full forward a token, one loop over edited positions.

No KV cache, no batch, no plan, no folding of several rows into one product. Everything the
engine computes must equal this, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_core.adapter import Adapter
from reft_core.edits import Edit, activate
from reft_core.sites import find_layers


def reference_delta(edit: Edit, h: Tensor) -> Tensor:
    """Δ(h) of one hidden state (d,), written out as the canonical formula reads."""
    total = torch.zeros_like(h)
    if edit.down is not None and edit.up is not None:
        for j in range(edit.rank):
            inner = h @ edit.down[:, j]
            if edit.bias is not None:
                inner = inner + edit.bias[j]
            inner = activate(edit.activation, inner)
            if edit.skip is not None:
                inner = inner - h @ edit.skip[:, j]
            total = total + edit.scale * inner * edit.up[j]
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
) -> Tensor:
    """Float32 logits (T, V) of ``tokens``, of which the first ``prompt_len`` are the prompt."""
    handles = []
    if adapter is not None:
        layers = find_layers(model)
        units = adapter.rule.resolve(prompt_len)
        for key, edit in adapter.edits.items():

            def hook(_module, _args, output, edit=edit, positions=units[key.unit]):
                hidden = output[0] if isinstance(output, tuple) else output
                for position in positions:
                    h = hidden[0, position]
                    hidden[0, position] = h + strength * reference_delta(edit, h)
                return output

            handles.append(layers[key.layer].register_forward_hook(hook))
    try:
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()


def reference_generate(
    model: PreTrainedModel,
    prompt: tuple[int, ...],
    max_tokens: int,
    adapter: Adapter | None = None,
    strength: float = 1.0,
) -> list[int]:
    """Greedy continuation of ``prompt``; the whole sequence is recomputed for every token."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits = reference_logits(model, tokens, len(prompt), adapter, strength)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]
