"""A causal model asked for what a metric needs, by its own forward or by our engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate as run_requests
from reft_core.engine.interface import AdapterChoice, Engine, Request, SamplingParams
from reft_core.loading import LoadedModel
from reft_core.positions import PositionRule
from trainer.collate import Collator
from trainer.compare.answers import Answers
from trainer.compare.choosing import Scorer, choose_labels, row_losses
from trainer.compare.probe import ProbeModel
from trainer.compare.task import Split, Task
from trainer.data import TokenisedExample
from trainer.evaluation.scoring import Metric
from trainer.evaluation.splits import generate

_EXTRA_TOKENS = 8
"""Tokens an answer may be longer than the longest reference before it is cut."""

_SCORE = SamplingParams(temperature=0, logprobs=0)


def answer_by_model(
    task: Task, split: Split, metric: Metric, model: Scorer | ProbeModel, rule: PositionRule
) -> Answers:
    """What ``metric`` needs, by ``model``'s own forward: the same code for every method.

    ``rule`` says which positions the model edits, which need not be those of the shared config.
    Texts are transformers' greedy ones on the base as it is now.
    """
    collator, size = Collator(rule), task.config.batch_size
    if metric.needs == "text":
        prompts = [row.prompt for row in split.rows]
        return _decoded(task, by_transformers(task.loaded, prompts, _room(task, split)))
    if metric.needs == "loss":
        assert not isinstance(model, ProbeModel), "a head has no loss of text"
        return Answers(losses=tuple(row_losses(model, split.rows, collator, size)))
    if isinstance(model, ProbeModel):
        return Answers(choices=tuple(model.choose(split.rows, collator, batch_size=size)))
    chosen = choose_labels(model, split.rows, task.label_answers, collator, batch_size=size)
    return Answers(choices=tuple(chosen))


def answer_by_engine(
    task: Task, split: Split, metric: Metric, adapter: Adapter | None = None
) -> Answers:
    """What ``metric`` needs, by our engine on the base, with ``adapter`` if there is one.

    The engine reads what prompts have in common once, so many examples before each cost little.
    """
    num_virtual = adapter.num_virtual_tokens if adapter else 0
    room = _room(task, split, num_virtual)
    longest = max(len(row.prompt) for row in split.rows) + num_virtual
    with serving_base(task.loaded, [adapter] if adapter else [], longest + room) as engine:
        if metric.needs == "text":
            digest = adapter.digest if adapter else None
            prompts = [row.prompt for row in split.rows]
            return _decoded(task, generate(engine, prompts, digest, room))
        if metric.needs == "loss":
            scores = score_answers(engine, split.rows, adapter)
            losses = zip(scores, split.rows, strict=True)
            return Answers(losses=tuple((-score, len(row.completion)) for score, row in losses))
        candidates = [
            TokenisedExample(row.prompt, tokens)
            for row in split.rows
            for tokens in task.label_answers.values()
        ]
        labels = list(task.label_answers)
        table = torch.tensor(score_answers(engine, candidates, adapter))
        best = table.view(len(split.rows), len(labels)).argmax(dim=1)
        return Answers(choices=tuple(labels[index] for index in best.tolist()))


def score_answers(
    engine: Engine, rows: Sequence[TokenisedExample], adapter: Adapter | None
) -> list[float]:
    """Log-probability of each row's completion as a whole."""
    chosen = (AdapterChoice(adapter.digest),) if adapter else ()
    requests = [
        Request(f"score-{index}", row.prompt, _SCORE, chosen, row.completion)
        for index, row in enumerate(rows)
    ]
    return [
        math.fsum(token.logprob for token in completion.tokens if token.logprob is not None)
        for completion in run_requests(engine, requests)
    ]


@contextmanager
def serving_base(
    loaded: LoadedModel,
    adapters: Iterable[Adapter],
    max_tokens: int,
    *,
    prefix_cache_bytes: int = EngineConfig.prefix_cache_bytes,
) -> Iterator[EmbeddedEngine]:
    """An engine on the base, with ``adapters`` loaded, for requests of ``max_tokens`` at most.

    An engine switches its model's attention for good; afterwards the model has its own again.
    """
    implementation = loaded.model.config._attn_implementation
    try:
        engine = EmbeddedEngine(
            loaded, EngineConfig(max_model_len=max_tokens, prefix_cache_bytes=prefix_cache_bytes)
        )
        engine.start()
        try:
            for adapter in adapters:
                engine.load_adapter(adapter)
            yield engine
        finally:
            engine.stop()
    finally:
        loaded.model.set_attn_implementation(implementation)


@torch.no_grad()
def by_transformers(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], room: int
) -> list[list[int]]:
    """Greedy answers of at most ``room`` tokens by transformers' own loop, one row at a time."""
    found = []
    for prompt in prompts:
        tokens = torch.tensor([list(prompt)], device=loaded.model.device)
        output: Any = loaded.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=sorted(loaded.eos_token_ids),
            pad_token_id=loaded.tokenizer.eos_token_id,
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


def _room(task: Task, split: Split, num_virtual: int = 0) -> int:
    """Most tokens of an answer."""
    wanted = max(len(row.completion) for row in split.rows) + _EXTRA_TOKENS
    longest = max(len(row.prompt) for row in split.rows) + num_virtual
    left = task.loaded.description.max_positions - longest
    return min(task.config.max_new_tokens or wanted, left)


def _decoded(task: Task, answers: Sequence[Sequence[int]]) -> Answers:
    decode = task.loaded.tokenizer.decode
    return Answers(texts=tuple(decode(list(a), skip_special_tokens=True) for a in answers))
