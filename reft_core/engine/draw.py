"""Draws one token from each row of logits, many rows at a time.

A row's token is a function of its logits, its parameters and one uniform number, whichever rows
stand beside it: the kept tokens' probabilities are laid end to end in the order of the
vocabulary, and the number says where to point. In that order, tokens of nearly the same
probability keep their places however the last bit of a logit falls, which differs from one
batch size to another. Sorted by probability they would swap.

Letters: R rows, V tokens of the vocabulary, F rows that a top-k or a top-p applies to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reft_core.engine.interface import SamplingParams

_MIN_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature could overflow; the choice is greedy anyway."""
_HEADS = (256, 4096)
"""How many of the likeliest tokens are looked at to find where top-k and top-p end, at first and
then. Only a row that keeps more is sorted whole, which costs many times the first look."""


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """A token from each row of softmax(logits / temperature), restricted by its filters.

    ``logits`` (R, V) float32, below infinity, and in each row one that is finite; ``uniforms``
    are R numbers from 0 up to, not including, 1. Every row keeps its likeliest token at least;
    of tokens that are equally likely, top-k and top-p keep those with lower ids.
    """
    device = logits.device
    temperatures = [max(row.temperature, _MIN_TEMPERATURE) for row in params]
    probs = torch.softmax(logits / _column(temperatures, torch.float32, device), dim=-1)
    # What min-p takes away is a tail, so the order of these two does not matter.
    _apply_min_p(probs, params)
    _apply_top_k_and_p(probs, params)
    mass = probs.cumsum(dim=-1, dtype=torch.float64)
    total = mass[:, -1:]
    target = _column(uniforms, torch.float64, device) * total
    # Rounding must not take it beyond the last kept token.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    found: list[int] = torch.searchsorted(mass, target, right=True).squeeze(1).tolist()
    return found


def _apply_min_p(probs: Tensor, params: Sequence[SamplingParams]) -> None:
    """Zero tokens of probs (R, V) less likely than min-p times the likeliest, in place."""
    if any(row.min_p for row in params):
        least = _column([row.min_p for row in params], torch.float32, probs.device)
        probs.masked_fill_(probs < least * probs.amax(dim=-1, keepdim=True), 0)


def _apply_top_k_and_p(probs: Tensor, params: Sequence[SamplingParams]) -> None:
    """Zero the tokens of probs (R, V) that top-k or top-p leave out, in place."""
    rows = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1]
    vocab_size = probs.shape[-1]
    for head in (*(size for size in _HEADS if size < vocab_size), vocab_size):
        if not rows:
            return
        part = probs if len(rows) == len(params) else probs[rows]  # (F, V)
        if head < vocab_size:
            likeliest = part.topk(head).values
        else:
            likeliest = part.sort(dim=-1, descending=True).values
        counts = _count_kept(likeliest, [params[row] for row in rows])  # (F, 1)
        # A count as long as the head may go on behind it, unless nothing does.
        settled = (counts < head) | (likeliest[:, -1:] == 0) | (head == vocab_size)
        done = [i for i, (ok,) in enumerate(settled.tolist()) if ok]
        if len(done) == len(params):
            _keep(probs, likeliest, counts)
        elif done:
            kept = part[done]
            _keep(kept, likeliest[done], counts[done])
            probs[[rows[i] for i in done]] = kept
        finished = set(done)
        rows = [row for i, row in enumerate(rows) if i not in finished]


def _count_kept(likeliest: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """How many of the likeliest tokens (F, K), in order, top-k and top-p keep: (F, 1)."""
    device, head = likeliest.device, likeliest.shape[-1]
    # Without a top-p no rounding of the sum may leave anything out.
    top_p = [row.top_p if row.top_p < 1 else 2.0 for row in params]
    before = likeliest.cumsum(dim=-1, dtype=torch.float64) - likeliest
    # The token that crosses top-p stays.
    counts = (before < _column(top_p, torch.float64, device)).sum(dim=-1, keepdim=True)
    top_k = _column([row.top_k or head for row in params], torch.int64, device)
    return torch.minimum(counts, top_k).clamp(min=1)


def _keep(probs: Tensor, likeliest: Tensor, counts: Tensor) -> None:
    """Zero all but the first ``counts`` (F, 1) of ``likeliest`` (F, K) in probs (F, V)."""
    last = likeliest.gather(1, counts - 1)
    probs.masked_fill_(probs < last, 0)
    following = likeliest.gather(1, counts.clamp(max=likeliest.shape[-1] - 1))
    is_cut = (counts < likeliest.shape[-1]) & (following == last) & (last > 0)
    if bool(is_cut.any()):  # the limit lies among equally likely tokens
        num_equal = counts - (likeliest > last).sum(dim=-1, keepdim=True)
        equal = probs == last
        probs.masked_fill_(equal & (equal.cumsum(dim=-1) > num_equal), 0)


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One value a row: (R, 1)."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)
