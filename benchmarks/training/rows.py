"""What is trained on: a question about a text, answered by one word."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from benchmarks.training.steps import Row
from reft_core.positions import PositionRule

_TEMPLATE = "Text: {}\nIs the tone of this text positive or negative?\nAnswer:"
_ANSWERS = (" positive", " negative")
_MAX_TOKENS = 128


def make_batches(
    passages: Sequence[str],
    encode: Callable[[str], list[int]],
    end: int,
    *,
    batch_size: int,
    num_batches: int,
) -> list[list[Row]]:
    """Batches of rows with distinct prompts, in a random order; answers are drawn.

    ``end`` is the token that ends an answer. Which answer is right matters to no clock.
    """
    draw = random.Random(0)
    rows = []
    for passage in draw.sample(passages, len(passages)):
        prompt = encode(_TEMPLATE.format(passage))
        if len(prompt) <= _MAX_TOKENS:
            rows.append({"prompt": prompt, "completion": [*encode(draw.choice(_ANSWERS)), end]})
        if len(rows) == batch_size * num_batches:
            break
    else:
        wanted = batch_size * num_batches
        raise ValueError(f"data: got {len(rows)} texts that are short enough, expected {wanted}")
    return [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]


def with_positions(batches: Sequence[Sequence[Row]], rule: str) -> list[list[Row]]:
    """The batches with the positions that ``rule`` edits in each prompt."""
    parsed = PositionRule.parse(rule)
    return [
        [
            {**row, "positions": [p for unit in parsed.resolve(len(row["prompt"])) for p in unit]}
            for row in rows
        ]
        for rows in batches
    ]
