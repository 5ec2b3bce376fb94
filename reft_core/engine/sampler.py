"""Turns a step's logits into one token a sequence.

A sequence's token depends on its own logits, history and seed, never on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_core.engine.interface import SamplingParams, Token, TokenLogprob
from reft_core.engine.sequence import Sequence
from reft_core.errors import RequestFailed

_MIN_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature could overflow; the choice is greedy anyway."""
_MAX_LOGIT = 1e30
"""Penalties below one multiply logits; what they make stays finite."""


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Token | RequestFailed]:
    """The next token of each sequence, or the error that ends it.

    ``logits`` (B, V) float32, may be overwritten. Plain greedy requests share one argmax;
    the rest are taken row by row, so that one row's failure stays its own.
    """
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    greedy = logits.argmax(dim=-1).tolist()
    results: list[Token | RequestFailed] = []
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if not finite[row]:
            results.append(RequestFailed("the model's logits are not finite for this request"))
        elif params.is_greedy and params.logprobs is None and not _adjusts(params):
            results.append(Token(greedy[row]))
        else:
            try:
                results.append(_sample_row(logits[row], sequence))
            except Exception as error:  # ends this request alone
                results.append(RequestFailed(f"sampling failed: {error}"))
    return results


def _adjusts(params: SamplingParams) -> bool:
    """Whether the parameters change logits before the choice."""
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def _sample_row(logits: Tensor, sequence: Sequence) -> Token:
    """One sequence's token from its logits (V,)."""
    params = sequence.request.params
    if sequence.request.completion:
        given = sequence.request.completion[sequence.num_generated]
        return _with_logprobs(logits, given, params.logprobs or 0)
    model_logits = logits
    if _adjusts(params):
        logits = _adjust(logits.clone(), sequence).clamp_(max=_MAX_LOGIT)
    if params.is_greedy:
        token_id = int(logits.argmax())
    else:
        token_id = _draw(
            logits / max(params.temperature, _MIN_TEMPERATURE), params, sequence.generator
        )
    if params.logprobs is None:
        return Token(token_id)
    return _with_logprobs(model_logits, token_id, params.logprobs)


def _adjust(logits: Tensor, sequence: Sequence) -> Tensor:
    """Logit bias and penalties, in place. Formulas as in the OpenAI and CTRL papers' APIs."""
    params = sequence.request.params
    device = logits.device
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=device)
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.token_ids[sequence.num_virtual :])), device=device)
        old = logits[seen]
        penalised = torch.where(
            old > 0, old / params.repetition_penalty, old * params.repetition_penalty
        )
        logits[seen] = penalised
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_generated:
        ids, counts = torch.tensor(sequence.generated_ids, device=device).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """A token from softmax(logits) (V,) restricted by top-k, top-p and min-p.

    Inverse transform sampling with one uniform number: the choice is a function of the
    logits and that number alone.
    """
    probs, ids = torch.softmax(logits, dim=-1).sort(descending=True, stable=True)
    mass = probs.double().cumsum(dim=-1)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1:
        keep &= mass - probs < params.top_p  # the token that crosses top_p stays
    if params.min_p:
        keep &= probs >= params.min_p * probs[0]
    keep[0] = True
    kept = int(keep.sum())  # every filter keeps a head of the sorted list
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
    index = int(torch.searchsorted(mass[:kept], uniform * mass[kept - 1].item(), right=True))
    return int(ids[min(index, kept - 1)])


def _with_logprobs(logits: Tensor, token_id: int, num_top: int) -> Token:
    """The token with natural-log probabilities under the model's own distribution."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(num_top)
    top = tuple(
        TokenLogprob(i, value) for i, value in zip(ids.tolist(), values.tolist(), strict=True)
    )
    return Token(token_id, float(logprobs[token_id]), top)
