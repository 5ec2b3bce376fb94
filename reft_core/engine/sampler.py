"""Turns a step's logits into one token a sequence.

A sequence's token depends on its own logits, history and seed, never on its neighbours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from reft_core.engine.draw import draw
from reft_core.engine.interface import Token
from reft_core.engine.logprobs import finite_rows, rows_at_once, with_logprobs
from reft_core.engine.penalties import adjust, adjusts
from reft_core.engine.sequence import Sequence
from reft_core.errors import RequestFailed

NOT_FINITE = "the model's logits are not finite for this request"
_unseeded = random.Random()


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Token | RequestFailed]:
    """The next token of each sequence, or the error that ends it.

    ``logits`` (B, V) float32, left as they are. Plain greedy requests share one argmax, the rest
    go through the same few operations together; if those fail, each alone, so that one row's
    failure stays its own.
    """
    finite = finite_rows(logits)
    results: list[Token | RequestFailed] = [RequestFailed(NOT_FINITE) for _ in sequences]
    if plain := [row for row, s in enumerate(sequences) if finite[row] and _is_plain(s)]:
        for row, token in zip(plain, _likeliest(_take(logits, plain)), strict=True):
            results[row] = Token(token)
    others = [row for row, s in enumerate(sequences) if finite[row] and not _is_plain(s)]
    # Drawn once, so that a second try does not move a seed's sequence on.
    uniforms = {row: _uniform(sequences[row]) for row in others}
    most = rows_at_once(logits)
    for start in range(0, len(others), most):
        rows = others[start : start + most]
        chosen = _choose_each(
            _take(logits, rows), [sequences[row] for row in rows], [uniforms[row] for row in rows]
        )
        for row, result in zip(rows, chosen, strict=True):
            results[row] = result
    return results


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    """These rows of the logits, in ascending order; not copied if they are all."""
    return logits if len(rows) == len(logits) else logits[rows]


def _likeliest(logits: Tensor) -> list[int]:
    """The token of the largest logit in each row of logits (R, V)."""
    # On a CPU numpy's is vector code, and several times as fast as torch's.
    best = logits.numpy().argmax(axis=-1) if logits.device.type == "cpu" else logits.argmax(dim=-1)
    tokens: list[int] = best.tolist()
    return tokens


def _is_plain(sequence: Sequence) -> bool:
    """Whether the likeliest token is all that is wanted."""
    request = sequence.request
    params = request.params
    return (
        params.is_greedy
        and params.logprobs is None
        and request.constraint is None
        and not request.completion
        and not adjusts(params)
    )


def _uniform(sequence: Sequence) -> float:
    """The next number of a sequence that draws its tokens, from 0 up to, not including, 1."""
    if sequence.request.params.is_greedy or sequence.request.completion:
        return 0.0
    return (sequence.generator or _unseeded).random()


def _choose_each(
    logits: Tensor, sequences: Seq[Sequence], uniforms: Seq[float]
) -> list[Token | RequestFailed]:
    """The token of each row of logits (R, V), together if that works."""
    try:
        return [*_choose(logits, sequences, uniforms)]
    except Exception as error:
        if len(sequences) == 1:
            return [RequestFailed(f"sampling failed: {error}")]
    return [
        _choose_each(logits[i : i + 1], [sequence], [uniform])[0]
        for i, (sequence, uniform) in enumerate(zip(sequences, uniforms, strict=True))
    ]


def _choose(logits: Tensor, sequences: Seq[Sequence], uniforms: Seq[float]) -> list[Token]:
    """The token of each row of logits (R, V). Raises what ends one of them."""
    changed = _changed(logits, sequences)
    chosen: dict[int, int] = {}
    greedy: list[int] = []
    drawn: list[int] = []
    for row, sequence in enumerate(sequences):
        if sequence.request.completion:
            chosen[row] = sequence.request.completion[sequence.num_generated]
        else:
            (greedy if sequence.request.params.is_greedy else drawn).append(row)
    if greedy:
        chosen.update(zip(greedy, _likeliest(_take(changed, greedy)), strict=True))
    if drawn:
        params = [sequences[row].request.params for row in drawn]
        found = draw(_take(changed, drawn), params, [uniforms[row] for row in drawn])
        chosen.update(zip(drawn, found, strict=True))
    tokens = {row: Token(token) for row, token in chosen.items()}
    num_top = {
        row: n for row, s in enumerate(sequences) if (n := s.request.params.logprobs) is not None
    }
    if num_top:
        rows = list(num_top)
        told = with_logprobs(_take(logits, rows), [chosen[r] for r in rows], [*num_top.values()])
        tokens.update(zip(rows, told, strict=True))
    return [tokens[row] for row in range(len(sequences))]


def _changed(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Logits (R, V) with bias, penalties and constraints worked in; the same if there are none."""
    is_adjusted = any(adjusts(sequence.request.params) for sequence in sequences)
    constrained = {
        row: constraint
        for row, sequence in enumerate(sequences)
        if (constraint := sequence.request.constraint) is not None
    }
    if not is_adjusted and not constrained:
        return logits
    changed = logits.clone()
    if is_adjusted:
        adjust(changed, sequences)
    for row, constraint in constrained.items():
        changed[row].masked_fill_(~constraint.allowed().to(logits.device), -torch.inf)
        if changed[row].amax() == -torch.inf:
            raise ValueError("the request's constraint allows no token")
    return changed
