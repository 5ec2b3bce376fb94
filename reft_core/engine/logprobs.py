"""Log-probabilities of given tokens, under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reft_core.engine.interface import Token, TokenLogprob

_MOST_NUMBERS_CPU = 1 << 17
"""In a temporary tensor over the vocabulary: few enough to stay in a core's cache."""
_MOST_NUMBERS = 1 << 24
"""The same elsewhere, where memory is the only limit."""


def rows_at_once(logits: Tensor) -> int:
    """How many rows of logits (R, V) to work on together."""
    most = _MOST_NUMBERS_CPU if logits.device.type == "cpu" else _MOST_NUMBERS
    return max(1, most // logits.shape[-1])


def finite_rows(logits: Tensor) -> list[bool]:
    """Whether each row of logits (R, V) is free of NaN and has a largest, finite value."""
    found: list[bool] = torch.isfinite(logits.amax(dim=-1)).tolist()
    return found


def with_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int], *, ranked: bool = False
) -> list[Token]:
    """Each row's token with its natural-log probability and the ``num_top`` likeliest tokens.

    ``logits`` (R, V) float32 are what the model puts out, before bias, penalties and
    temperature. ``ranked`` adds the token's own rank; of equally likely ones all have the best.
    """
    num_rows = rows_at_once(logits)
    tokens: list[Token] = []
    for start in range(0, len(token_ids), num_rows):
        end = start + num_rows
        tokens += _some_with_logprobs(
            logits[start:end], token_ids[start:end], num_top[start:end], ranked=ranked
        )
    return tokens


def _some_with_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int], *, ranked: bool
) -> list[Token]:
    """See :func:`with_logprobs`."""
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))  # (R, 1)
    ranks: list[int] | list[None] = [None] * len(token_ids)
    if ranked:
        ranks = ((logprobs > own).sum(dim=-1) + 1).tolist()
    values, ids = logprobs.topk(min(max(num_top), logprobs.shape[-1]))
    rows = zip(
        token_ids, own.squeeze(1).tolist(), ranks, ids.tolist(), values.tolist(), strict=True
    )
    return [
        Token(
            token,
            logprob,
            tuple(TokenLogprob(i, v) for i, v in zip(top[:n], likely[:n], strict=True)),
            rank,
        )
        for (token, logprob, rank, top, likely), n in zip(rows, num_top, strict=True)
    ]
