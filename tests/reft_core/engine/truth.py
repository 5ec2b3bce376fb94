"""Requests that run together, against the slow reference of each alone.

Every logit of every generated token is compared, not only what was sampled.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

import reft_core.engine.engine as engine_module
from reft_core.adapter import Adapter
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from tests.reference.slow import reference_logits

TOLERANCE = 1e-3
"""Largest difference of a log-probability, in float32."""

_ids = itertools.count()


@dataclass(frozen=True)
class Used:
    """An adapter as a request uses it."""

    adapter: Adapter
    strength: float = 1.0
    subspaces: Mapping[str, float] = field(default_factory=dict)
    source: tuple[int, ...] = ()

    @property
    def choice(self) -> AdapterChoice:
        """The engine's form of it."""
        return AdapterChoice(self.adapter.digest, self.strength, self.subspaces, self.source)


@dataclass(frozen=True)
class Case:
    """A prompt and the adapters that act on it, in order."""

    prompt: tuple[int, ...]
    stack: tuple[Used, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        used = [f"{use.adapter.spec.name} at {use.strength}" for use in self.stack]
        return f"{', '.join(used) or 'base'} on {len(self.prompt)} tokens"


@dataclass(frozen=True)
class Answer:
    """What an engine made of a case."""

    token_ids: list[int]
    logits: Tensor
    """Those that each token was chosen from, (tokens, V)."""


def run_together(
    engine: EmbeddedEngine, cases: Sequence[Case], max_tokens: int, **params: Any
) -> list[Answer]:
    """Every case's greedy answer, all submitted at once to a started engine."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **params)
    requests = []
    for case in cases:
        for use in case.stack:
            engine.load_adapter(use.adapter)
        choices = tuple(use.choice for use in case.stack)
        requests.append(Request(f"together-{next(_ids)}", case.prompt, sampling, choices))
    with recorded_logits() as seen:
        completions = generate(engine, requests)
    return [
        Answer(completion.token_ids, torch.stack(seen[request.request_id]))
        for request, completion in zip(requests, completions, strict=True)
    ]


@contextmanager
def recorded_logits() -> Iterator[dict[str, list[Tensor]]]:
    """The logits (V,) that engines sample from while this is open, by request, in order."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    sample = engine_module.sample

    def recording(logits: Tensor, sequences: Any, *rest: Any, **options: Any) -> Any:
        for row, sequence in zip(logits, sequences, strict=True):
            seen[sequence.request.request_id].append(row.clone())
        return sample(logits, sequences, *rest, **options)

    with mock.patch.object(engine_module, "sample", recording):
        yield seen


def alone(model: PreTrainedModel, case: Case, token_ids: Sequence[int]) -> Tensor:
    """The slow reference's logits (tokens, V) at which it chooses each of ``token_ids``."""
    prompt_len = len(case.prompt)
    logits = reference_logits(
        model,
        [*case.prompt, *token_ids],
        prompt_len,
        stack=[(use.adapter, use.strength) for use in case.stack],
        sources={use.adapter.digest: use.source for use in case.stack if use.source},
        subspaces={use.adapter.digest: use.subspaces for use in case.stack if use.subspaces},
    )
    return logits[prompt_len - 1 : -1]


def assert_as_alone(model: PreTrainedModel, case: Case, answer: Answer) -> None:
    """Every log-probability is the slow reference's; so each token is its greedy one or as good."""
    expected = torch.log_softmax(alone(model, case, answer.token_ids), dim=-1)
    found = torch.log_softmax(answer.logits, dim=-1)
    worst = (found - expected).abs().amax(-1)
    assert (worst < TOLERANCE).all(), f"{case.name}: largest difference at each token {worst}"
    assert found.argmax(-1).tolist() == answer.token_ids, case.name


def matters(model: PreTrainedModel, case: Case, answer: Answer) -> bool:
    """Whether the base model on its own would have chosen another token somewhere."""
    plain = alone(model, Case(case.prompt), answer.token_ids)
    return plain.argmax(-1).tolist() != answer.token_ids
