"""Rows to batches on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device


def batches(
    rows: Sequence[Any],
    size: int,
    collator: Callable[[Sequence[Any]], Any],
    device: torch.device,
) -> Iterator[Any]:
    """``rows`` in order, in the collator's batches on ``device``."""
    for start in range(0, len(rows), size):
        yield send_to_device(collator(rows[start : start + size]), device)
