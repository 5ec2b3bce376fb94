"""Prompts under adapters, each with the one right answer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from benchmarks.soak.oracle import TIE, Case, Oracle
from benchmarks.workloads import own_passages
from reft_core.templates import encode_text

_SURE = 10 * TIE
"""Answers in which two tokens were ever closer are not asked for: no tie excuses a difference."""


@dataclass(frozen=True)
class Question:
    """A greedy request for text, and its answer as the server gives it to nobody else."""

    model: str
    prompt: list[int]
    max_tokens: int
    digest: str | None
    """Of the adapter that must answer; None: the base model."""
    text: str
    finish_reason: str


def make_questions(
    oracle: Oracle,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    names: Mapping[str, str],
    *,
    num_prompts: int,
    max_tokens: int,
    seed: int,
) -> list[Question]:
    """Every prompt under the base model and each adapter; ``names`` are of digests.

    A prompt is taken only if all answers to it differ, so that the wrong adapter would be seen.
    """
    rng = random.Random(seed)
    passages = own_passages()
    rng.shuffle(passages)
    questions: list[Question] = []
    for passage in passages:
        prompt = encode_text(tokenizer, passage)[: rng.randint(6, 40)]
        found = [
            _question(oracle, name, digest, prompt, max_tokens)
            for digest, name in [(None, base), *names.items()]
        ]
        sure = [question for question in found if question is not None]
        if len(sure) == len(found) and len({q.text for q in sure}) == len(sure):
            questions += sure
        if len(questions) >= num_prompts * len(found):
            break
    if not questions:
        raise RuntimeError("no prompt tells the adapters apart")
    return questions


def _question(
    oracle: Oracle, name: str, digest: str | None, prompt: list[int], max_tokens: int
) -> Question | None:
    """One prompt under one adapter; None if rounding could change its answer."""
    adapters = () if digest is None else ((digest, None),)
    solo = oracle.solo(Case(adapters, tuple(prompt)))
    if min(solo.gaps[: max_tokens + 1]) < _SURE:
        return None
    text, reason = oracle.answer(solo, max_tokens)
    return Question(name, prompt, max_tokens, digest, text, reason)
