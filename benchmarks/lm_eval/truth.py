"""The log-likelihood of a continuation by transformers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.lm_eval.harness import Scored
from reft_core.loading import LoadedModel


@dataclass(frozen=True)
class Agreement:
    """How far a harness's numbers are from the truth."""

    num_scores: int
    max_difference: float
    """Between two log-likelihoods of the same continuation, in nats."""
    num_greedy_differs: int
    """Continuations of which only one side says that greedy decoding writes them."""


@torch.inference_mode()
def loglikelihood(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Of ``continuation`` after ``context``, and whether it is what greedy decoding writes.

    The context must not be empty. Spaces at its end belong to the continuation, as tokenizers
    join them to the word that follows.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    whole = loaded.tokenizer(kept + continuation)["input_ids"]
    start = len(loaded.tokenizer(kept)["input_ids"])
    logits = loaded.model(torch.tensor([whole])).logits[0, start - 1 : -1].float()  # (tokens, V)
    wanted = torch.tensor(whole[start:])
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def compare(loaded: LoadedModel, scored: list[Scored]) -> Agreement:
    """The harness's scores against the truth."""
    differences, num_greedy_differs = [0.0], 0
    for item in scored:
        logprob, is_greedy = loglikelihood(loaded, item.context, item.continuation)
        differences.append(abs(logprob - item.logprob))
        num_greedy_differs += is_greedy != item.is_greedy
    return Agreement(len(scored), max(differences), num_greedy_differs)
