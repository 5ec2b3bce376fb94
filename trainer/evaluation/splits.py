"""What ``reft train`` measures of its held-out splits, by the engine that will serve them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from reft_core.classification import label_tokens
from reft_core.engine.generate import generate as run_requests
from reft_core.engine.interface import AdapterChoice, Engine, Request, SamplingParams
from trainer.batches import batches
from trainer.collate import IGNORED, Collator
from trainer.data import Dataset, TokenisedExample
from trainer.evaluation.scoring import Confusion, confusion, score
from trainer.reft_model import ReftModel


@dataclass(frozen=True)
class Sample:
    """One evaluated row, for people."""

    question: str
    reference: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Evaluation:
    """How base and adapter answered one split."""

    metrics: dict[str, float]
    """Each metric by name for the adapter, and by ``base_`` and its name for the base."""
    confusion: Confusion | None
    """The adapter's, for labellers."""
    samples: tuple[Sample, ...]
    """Every row."""


class Decoder(Protocol):
    """The one thing asked of a tokenizer here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of these tokens."""


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], adapter: str | None, max_tokens: int
) -> list[list[int]]:
    """Greedy answers to ``prompts``, in order, by the adapter of this digest or the base."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    kind = adapter or "base"
    chosen = (AdapterChoice(adapter),) if adapter else ()
    requests = [
        Request(f"evaluate-{kind}-{index}", tuple(prompt), params, chosen)
        for index, prompt in enumerate(prompts)
    ]
    return [completion.token_ids for completion in run_requests(engine, requests)]


def evaluate(
    engine: Engine,
    decoder: Decoder,
    dataset: Dataset,
    rows: Sequence[TokenisedExample],
    *,
    adapter: str,
    metrics: Sequence[str],
    labels: Sequence[str] | None,
    max_tokens: int,
) -> Evaluation:
    """Greedy answers of base and adapter to every row, scored against the references."""
    prompts = [row.prompt for row in rows]
    answers = {
        digest: [
            decoder.decode(tokens, skip_special_tokens=True)
            for tokens in generate(engine, prompts, digest, max_tokens)
        ]
        for digest in (None, adapter)
    }
    return evaluation_of(dataset, answers[None], answers[adapter], metrics, labels)


def evaluation_of(
    dataset: Dataset,
    base: Sequence[str],
    edited: Sequence[str],
    metrics: Sequence[str],
    labels: Sequence[str] | None,
) -> Evaluation:
    """The answers of base and adapter to every row of ``dataset``, scored."""
    references = [example.completion for example in dataset.examples]
    found = {}
    for name in metrics:
        found[name] = score(name, edited, references)
        found[f"base_{name}"] = score(name, base, references)
    questions = (example.question for example in dataset.examples)
    samples = map(Sample, questions, references, base, edited)
    matrix = confusion(labels, edited, references) if labels else None
    return Evaluation(found, matrix, tuple(samples))


@torch.no_grad()
def likeliest_labels(
    model: ReftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenisedExample],
    labels: Sequence[str],
    collator: Collator,
    *,
    batch_size: int,
    edited: bool,
) -> list[str]:
    """For each row the label to which the model gives the highest probability.

    A base model seldom answers with a bare label, so its generated answers are nearly all
    wrong; what it would choose among the labels is the fairer comparison. With ``edited``
    false the base is asked. See :func:`reft_core.classification.labels.counted`.
    """
    answers = label_tokens(tokenizer, labels)
    candidates = [TokenisedExample(row.prompt, answer) for row in rows for answer in answers]
    scores = []
    for batch in batches(candidates, batch_size, collator, model.device):
        is_answer = batch["labels"] != IGNORED  # (B, C)
        with nullcontext() if edited else model.base_only():
            logits = model(**batch)["logits"].float()
        losses = F.cross_entropy(logits, batch["labels"][is_answer], reduction="none")  # (N,)
        per_row = torch.zeros_like(is_answer, dtype=losses.dtype)
        per_row[is_answer] = losses
        scores.append(-per_row.sum(dim=1).cpu())
    best = torch.cat(scores).view(len(rows), len(labels)).argmax(dim=1)
    return [labels[index] for index in best.tolist()]
