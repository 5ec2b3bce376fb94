"""Which rows are trained on when. It depends on the seed alone, so a run can be taken up again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import TypeVar

import torch

from trainer.config import TrainConfig
from trainer.task import EpochOrder

T = TypeVar("T")


def num_steps(config: TrainConfig, num_rows: int) -> int:
    """Steps of the optimiser in a whole run."""
    return config.steps or math.ceil(config.epochs * num_rows / config.batch_size)


def steps_between_validations(config: TrainConfig, num_rows: int) -> int:
    """``eval_steps``, or those of an epoch."""
    return config.eval_steps or math.ceil(num_rows / config.batch_size)


def shuffled(num_rows: int, seed: int) -> EpochOrder:
    """Each epoch in a new order."""

    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed + epoch)
        places: list[int] = torch.randperm(num_rows, generator=generator).tolist()
        return places

    return order


def visits(order: EpochOrder) -> Iterator[int]:
    """Rows in the order of training, without end: epoch after epoch."""
    for epoch in count():
        yield from order(epoch)


def in_order(rows: Sequence[T], config: TrainConfig, order: EpochOrder | None = None) -> list[T]:
    """Every row as often, and in the order, as a run trains on it; shuffled without ``order``.

    All steps have ``batch_size`` rows: one may hold an epoch's last and the next one's first.
    """
    wanted = num_steps(config, len(rows)) * config.batch_size
    places = visits(order or shuffled(len(rows), config.seed))
    return [rows[place] for place in islice(places, wanted)]


def spread(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most ``limit`` rows, evenly from all: files are often sorted."""
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[place * len(rows) // limit] for place in range(limit)]
