"""Rows to batches on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.collate import Batch, Collator
from trainer.data import TokenisedExample


def batches(
    rows: Sequence[TokenisedExample], size: int, collator: Collator, device: torch.device
) -> Iterator[Batch]:
    """``rows`` in order, in batches on ``device``."""
    for start in range(0, len(rows), size):
        batch: dict[str, Any] = dict(collator(rows[start : start + size]))
        for name, value in batch.items():
            batch[name] = value.to(device) if isinstance(value, Tensor) else value
        yield Batch(**batch)  # type: ignore[typeddict-item]
