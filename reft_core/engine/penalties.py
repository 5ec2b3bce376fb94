"""Logit bias and penalties of many rows at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from reft_core.engine.interface import SamplingParams
from reft_core.engine.sequence import Sequence

_MAX_LOGIT = 1e30
"""Penalties below one multiply logits; what they make stays finite."""

_Entries = list[tuple[int, int, float]]
"""Row, token and value."""


def adjusts(params: SamplingParams) -> bool:
    """Whether the parameters change logits before the choice."""
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def adjust(logits: Tensor, sequences: Seq[Sequence]) -> None:
    """Apply each sequence's bias and penalties to its row of logits (B, V), in place.

    A positive logit of a seen token is divided by the repetition penalty, any other one
    multiplied; presence and frequency penalties are subtracted, once and once an occurrence.
    """
    biases: _Entries = []
    repetitions: _Entries = []
    losses: _Entries = []
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        biases += ((row, token, bias) for token, bias in params.logit_bias.items())
        if params.repetition_penalty != 1:
            seen = set(sequence.token_ids[sequence.num_virtual :])
            repetitions += ((row, token, params.repetition_penalty) for token in seen)
        if params.presence_penalty or params.frequency_penalty:
            for token, count in Counter(sequence.generated_ids).items():
                loss = params.presence_penalty + params.frequency_penalty * count
                losses.append((row, token, loss))
    if biases:
        where, amounts = _tensors(biases, logits.device)
        _put(logits, where, logits[where] + amounts)
    if repetitions:
        where, factors = _tensors(repetitions, logits.device)
        old = logits[where]
        _put(logits, where, torch.where(old > 0, old / factors, old * factors))
    if losses:
        where, amounts = _tensors(losses, logits.device)
        _put(logits, where, logits[where] - amounts)


def _tensors(entries: _Entries, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rows and tokens (K,) that index logits, and the values (K,) float32 of those places."""
    rows, tokens, values = zip(*entries, strict=True)
    where = torch.tensor([rows, tokens], device=device)
    return (where[0], where[1]), torch.tensor(values, dtype=torch.float32, device=device)


def _put(logits: Tensor, where: tuple[Tensor, Tensor], values: Tensor) -> None:
    """Set these places of the logits; each is named once."""
    logits[where] = values.clamp(max=_MAX_LOGIT)
