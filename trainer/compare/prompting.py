"""Zero-shot and few-shot: no training, only what stands before the question."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from reft_core.classification.labels import Tokens
from reft_core.errors import TrainingError, explain
from reft_core.templates import encode_chat
from trainer.compare.task import Split, Task
from trainer.data import Dataset, Example, TokenisedExample


def with_shots(task: Task, split: Split, shots: int, seed: int) -> Split:
    """``split`` with ``shots`` training rows and their answers before each prompt.

    The rows are drawn from the seed, of every answer in turn where the task has labels. In a
    chat template they are earlier turns of the conversation; in a template of one's own each is
    a prompt and its answer as training writes them, then an empty line. Raises
    :class:`TrainingError` when a row no longer fits the base's context.
    """
    if shots == 0:
        return split
    drawn = draw_shots(task.train.dataset, shots, seed, labelled=bool(task.config.labels))
    context = task.loaded.description.max_positions
    rows = []
    before = None if task.config.template is None else _plain(task, drawn)
    for example, row in zip(split.dataset.examples, split.rows, strict=True):
        if before is None:
            prompt = _as_turns(task, drawn, example)
        else:
            prompt = (*before, *_without_bos(task, row.prompt))
        if len(prompt) + len(row.completion) > context:
            raise TrainingError(
                explain("shots", shots, f"fewer: {example.where} then exceeds {context} tokens"),
                field="shots",
            )
        rows.append(TokenisedExample(prompt, row.completion))
    return replace(split, rows=rows)


def draw_shots(dataset: Dataset, count: int, seed: int, *, labelled: bool) -> list[Example]:
    """``count`` rows in a random order; with ``labelled``, equally many of each answer if it can.

    Raises :class:`TrainingError` if there are not so many.
    """
    if count > len(dataset.examples):
        raise TrainingError(explain("shots", count, f"at most {len(dataset.examples)}"))
    generator = random.Random(seed)
    pool = generator.sample(dataset.examples, len(dataset.examples))
    if labelled:
        seen: dict[str, int] = {}
        turn = []
        for example in pool:
            answer = example.completion.strip()
            turn.append(seen.get(answer, 0))
            seen[answer] = turn[-1] + 1
        pool = [pool[index] for index in sorted(range(len(pool)), key=turn.__getitem__)]
    chosen = pool[:count]
    generator.shuffle(chosen)
    return chosen


def _as_turns(task: Task, drawn: Sequence[Example], example: Example) -> Tokens:
    """The prompt as a conversation in which the drawn rows were answered before."""
    system = [m for m in example.messages if m["role"] == "system"]
    asked = [m for m in example.messages if m["role"] != "system"]
    before = [
        message
        for shot in drawn
        for message in (
            *(m for m in shot.messages if m["role"] != "system"),
            {"role": "assistant", "content": shot.completion},
        )
    ]
    return tuple(encode_chat(task.loaded.tokenizer, [*system, *before, *asked]))


def _plain(task: Task, drawn: Sequence[Example]) -> Tokens:
    """The drawn rows as training writes them, an empty line after each."""
    tokenizer = task.loaded.tokenizer
    gap = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    tokens: list[int] = []
    for index, shot in enumerate(drawn):
        prompt = tuple(encode_chat(tokenizer, shot.messages, task.config.template))
        tokens += prompt if index == 0 else _without_bos(task, prompt)
        tokens += [*tokenizer(shot.completion, add_special_tokens=False)["input_ids"], *gap]
    return tuple(tokens)


def _without_bos(task: Task, prompt: Tokens) -> Tokens:
    """``prompt`` as it goes on after other text."""
    bos = task.loaded.tokenizer.bos_token_id
    begins = bos is not None and prompt[:1] == (bos,)
    added = task.loaded.tokenizer("x")["input_ids"][:1] == [bos]
    return prompt[1:] if begins and added else prompt
