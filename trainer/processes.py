"""Several processes that train one adapter together, each on its share of every step's rows.

``accelerate launch`` starts them; a run of one process is the same with a world of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from torch import distributed


def _joined() -> PartialState:
    """accelerate's view, once this process has joined the others, where there are any.

    Told that it is on a CPU, since it would not look for others there by itself.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def device() -> torch.device:
    """Where this process computes."""
    found: torch.device = _joined().device
    return found


def world() -> tuple[int, int]:
    """This process's number, from 0, and how many work together now."""
    state = _joined()
    if not distributed.is_initialized():
        return 0, 1
    return state.process_index, state.num_processes


def summed(values: Sequence[float]) -> list[float]:
    """The sum of each value over all processes, every one of which must call this."""
    if world()[1] == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device())
    distributed.all_reduce(total)
    found: list[float] = total.tolist()
    return found


def leave() -> bool:
    """End the common work; whether this process is the one that goes on alone."""
    process, num_processes = world()
    if num_processes > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    return process == 0
