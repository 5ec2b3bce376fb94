"""Brings adapters to a GPU beside the work that runs there.

An adapter's tensors are packed into one pinned buffer and copied at once on a stream of their
own. The main stream is the device's default one, where every thread of this process computes. It
waits for the copy only when a request first names the adapter, and the host never waits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from reft_core.adapter import Adapter, Prefix

_ALIGNMENT = 64
"""Float32 numbers to a multiple of which each tensor's place is rounded up: 256 bytes."""


class Uploads:
    """Brings adapters to one device, and knows which of them are still on their way.

    :meth:`start` may be called from any thread; the other methods need one lock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._main = torch.cuda.default_stream(device)
            self._side = torch.cuda.Stream(device)
        self._arrivals: dict[str, torch.cuda.Event] = {}

    def start(self, adapter: Adapter) -> tuple[Adapter, torch.cuda.Event | None]:
        """The adapter folded and on the device, once the event has happened if there is one."""
        if not self._on_gpu:
            return adapter.to(self._device), None
        return packed(adapter, self._copy, pin=True), self._side.record_event()

    def add(self, digest: str, arrival: torch.cuda.Event | None) -> None:
        """Remember that an adapter must be waited for."""
        if arrival is not None:
            self._arrivals[digest] = arrival

    def wait(self, digest: str) -> None:
        """Have all that is launched from now on run after an adapter has arrived.

        Called before an adapter is first read, and before it is dropped: its memory then goes to
        what is launched next, which must not begin while the copy still writes there.
        """
        if (arrival := self._arrivals.pop(digest, None)) is not None:
            arrival.wait(self._main)

    def _copy(self, host: Tensor) -> Tensor:
        """A copy of pinned memory, which is not given out again before the copy has ended."""
        with torch.cuda.stream(self._main):
            buffer = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        # What was launched before may still read what this memory held until now.
        self._side.wait_event(self._main.record_event())
        with torch.cuda.stream(self._side):
            return buffer.copy_(host, non_blocking=True)


def packed(adapter: Adapter, move: Callable[[Tensor], Tensor], *, pin: bool = False) -> Adapter:
    """The adapter folded, its tensors views of one that ``move`` made of a flat float32 one."""
    edits = {key: edit.fold() for key, edit in adapter.edits.items()}
    prefix = adapter.prefix or Prefix()
    tensors = [tensor for edit in edits.values() for _, tensor in edit.parts()]
    tensors += prefix.tensors().values()
    sizes = [math.ceil(tensor.numel() / _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    starts = list(itertools.accumulate(sizes, initial=0))
    flat = torch.empty(starts[-1], dtype=torch.float32, pin_memory=pin)
    for start, tensor in zip(starts, tensors, strict=False):
        flat[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
    flat = move(flat)
    views = (
        flat[start : start + tensor.numel()].view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=False)
    )
    moved = {
        key: replace(edit, **{part: next(views) for part, _ in edit.parts()})  # type: ignore[arg-type]
        for key, edit in edits.items()
    }
    there = {name: next(views) for name in prefix.tensors()}
    layers = range(len(prefix.keys))
    moved_prefix = Prefix(
        tuple(there[f"prefix.{layer}.key"] for layer in layers),
        tuple(there[f"prefix.{layer}.value"] for layer in layers),
        there.get("prefix.embedding"),
    )
    return replace(adapter, edits=moved, prefix=adapter.prefix and moved_prefix)
