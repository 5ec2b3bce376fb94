"""The slow truth about drawing a token: one row, the whole vocabulary sorted, plain Python."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_core.engine.interface import SamplingParams


def reference_draw(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """The token of one row of logits (V,), for a number from 0 up to, not including, 1.

    Top-k, top-p and min-p each keep a beginning of the tokens in order of probability, equal
    ones in order of their ids. The kept ones then lie end to end in the vocabulary's order.
    """
    probs = torch.softmax(logits / max(params.temperature, 1e-6), dim=-1)
    ordered, ids = probs.sort(descending=True, stable=True)
    before = ordered.double().cumsum(dim=-1) - ordered
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1:
        keep &= before < params.top_p  # the token that crosses top_p stays
    if params.min_p:
        keep &= ordered >= params.min_p * ordered[0]
    keep[0] = True
    kept = sorted(ids[: int(keep.sum())].tolist())
    total = 0.0
    ends = []
    for token in kept:
        total += float(probs[token])
        ends.append(total)
    return next((t for t, end in zip(kept, ends, strict=True) if end > uniform * total), kept[-1])
