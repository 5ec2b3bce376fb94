"""Decode steps recorded once and replayed: CUDA graphs, a bucket of rows and keys each.

A step without edits launches the same operations every time, so a GPU can be handed all of them
at once. A graph repeats what was recorded: the same number of rows, the same view of the keys,
the same memory. So a step is padded to the next bucket, its numbers are copied to where the
recorded operations read them, and all graphs leave their logits in one place.

A padding row attends to the first position of whatever slot it stands for, and stores its key in
that slot's spare position, which nobody reads. It changes nothing, whether the slot is free or
belongs to a sequence that is still being prefilled.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from reft_core.engine.attention import DecodeBatch
from reft_core.engine.kv import SlotKV

MIN_KEYS = 256
"""Keys of the smallest bucket; attention over so few takes no time worth another graph."""
MAX_GRAPHS = 64
"""Graphs recorded at most. Steps of further buckets run without."""
WARM_UP_S = 30.0
"""Seconds after which the start records no further graphs; the rest follow on first use."""

Forward = Callable[[Tensor, Tensor, DecodeBatch], Tensor]
"""Tokens and positions (B, 1) and the batch to float32 logits (B, V)."""
Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Takes a step that only touches memory which stays, and returns what repeats it."""

log = logging.getLogger(__name__)


class Bucket(NamedTuple):
    """The shape of a recorded step."""

    num_rows: int
    num_keys: int


class CudaRecorder:
    """Records steps of one device as CUDA graphs that share one pool of memory.

    They may share it because only one of them runs at a time, and nothing is read from it
    after a replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Replay:
        """Record ``step`` without running it; raises whatever keeps it from being recorded."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                # Only this thread's calls are recorded: others load adapters meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    step()
            except BaseException:
                self._end_failed()
                raise
            finally:
                # When a recording cannot be ended, torch leaves its stream the current one.
                torch.cuda.set_stream(before)
        return graph.replay

    def _end_failed(self) -> None:
        """Tell torch's allocator that a recording is over that could not be ended.

        It would hold back freed memory for good. There is no public way to say so, and no harm
        if the allocator knows.
        """
        with suppress(Exception):
            index = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(index, self._pool)  # type: ignore[arg-type, unused-ignore]


def recorder_for(device: torch.device, wanted: bool) -> Record | None:
    """What records steps on this device, if there is such a thing and it is wanted."""
    return CudaRecorder(device) if wanted and device.type == "cuda" else None


def doublings(first: int, last: int) -> tuple[int, ...]:
    """``first``, twice that, four times that and so on; the last is ``last``."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return (*found, last)


class DecodeGraphs:
    """Replays decode steps of one model over one KV store. Belongs to the engine's thread."""

    def __init__(
        self,
        forward: Forward,
        kv: SlotKV,
        record: Record,
        *,
        tolerance: float,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        assert kv.has_spare, "padding rows store at a spare position"
        self._forward = forward
        self._kv = kv
        self._record = record
        self._tolerance = tolerance
        self._max_graphs = max_graphs
        self._rows = doublings(1, kv.num_slots)
        self._keys = doublings(MIN_KEYS, kv.slot_len)
        self._replays: dict[Bucket, Replay] = {}
        self._inputs: dict[int, Tensor] = {}
        self._logits: Tensor | None = None
        self._gave_up = False
        self.warm_up_s = 0.0

    def __len__(self) -> int:
        """Graphs recorded so far."""
        return len(self._replays)

    def bucket_of(self, num_rows: int, num_keys: int) -> Bucket:
        """The smallest bucket that a step fits in."""
        return Bucket(
            self._rows[bisect_left(self._rows, num_rows)],
            self._keys[bisect_left(self._keys, num_keys)],
        )

    @torch.inference_mode()
    def warm_up(self, seconds: float = WARM_UP_S) -> None:
        """Record graphs, for about ``seconds`` at most. All slots must be free.

        The largest come first, so that the others fit into the memory they took.
        """
        started = time.monotonic()
        for num_rows in reversed(self._rows):
            for num_keys in reversed(self._keys):
                if not self._may_record or time.monotonic() - started > seconds:
                    break
                # The last position of the bucket, so that all its keys are in view.
                at = num_keys - 1
                self.decode([row % 8 for row in range(num_rows)], [at] * num_rows)
                self._kv.clear_position(num_rows, at)
        self.warm_up_s = time.monotonic() - started
        log.info("recorded %d decode graphs in %.1f s", len(self), self.warm_up_s)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        """Float32 logits (B, V) of one token for each of slots 0..B-1, or None without a graph.

        They may be overwritten, and stay until the next call. A step of a new bucket runs
        without a graph and is recorded for the next time.
        """
        bucket = self.bucket_of(len(tokens), max(positions) + 1)
        replay = self._replays.get(bucket)
        if replay is None:
            return self._first(bucket, tokens, positions) if self._may_record else None
        self._fill(bucket, tokens, positions)
        replay()
        assert self._logits is not None
        return self._logits[: len(tokens)]

    @property
    def _may_record(self) -> bool:
        return not self._gave_up and len(self._replays) < self._max_graphs

    def _first(
        self, bucket: Bucket, tokens: Sequence[int], positions: Sequence[int]
    ) -> Tensor | None:
        """Run a step, record it, and keep the graph if it repeats the logits.

        Whatever goes wrong ends the recording of graphs for good; those there are stay.
        """
        num_rows = len(tokens)
        try:
            inputs = self._fill(bucket, tokens, positions)
            # Run before it is recorded: libraries set themselves up on first use.
            expected = self._step(bucket, inputs)
            if self._logits is None:
                self._logits = expected.new_empty(self._rows[-1], expected.shape[1])
            out = self._logits[: bucket.num_rows]

            def step() -> None:
                out.copy_(self._step(bucket, inputs))

            replay = self._record(step)
            out.fill_(float("nan"))
            replay()
            error = _largest_error(out[:num_rows], expected[:num_rows])
        except Exception as reason:
            self._gave_up = True
            # Ending a recording that an error has spoilt is an error of its own.
            cause = reason.__context__ or reason
            log.warning("no further decode graphs: recording %s failed: %s", bucket, cause)
            return None
        if error <= self._tolerance:
            self._replays[bucket] = replay
        else:
            self._gave_up = True
            log.warning("no further decode graphs: that of %s is off by %.2g", bucket, error)
        return expected[:num_rows]

    def _step(self, bucket: Bucket, inputs: Tensor) -> Tensor:
        """Logits (B, V) for what ``inputs`` (3, B) holds; waits for nothing on the device."""
        tokens, positions, store_at = inputs
        batch = DecodeBatch(self._kv, positions, bucket.num_keys, store_at)
        return self._forward(tokens.unsqueeze(1), positions.unsqueeze(1), batch)

    def _fill(self, bucket: Bucket, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Put a step's numbers, padded, where the graphs of as many rows read them."""
        num_rows, device = bucket.num_rows, self._kv.device
        if num_rows not in self._inputs:
            self._inputs[num_rows] = torch.empty(3, num_rows, dtype=torch.int64, device=device)
        padding = num_rows - len(tokens)
        rows = [
            [*tokens, *[0] * padding],
            [*positions, *[0] * padding],
            [*positions, *[self._kv.slot_len] * padding],
        ]
        # Pinned memory is not given out again before the copy out of it has ended.
        numbers = torch.tensor(rows, pin_memory=device.type == "cuda")
        return self._inputs[num_rows].copy_(numbers, non_blocking=True)


def _largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value.

    Logits that are not finite count for nothing: a request's own numbers may be the cause.
    """
    finite = expected.isfinite()
    difference = torch.where(finite, found - expected, 0).abs().max()
    scale = torch.where(finite, expected, 0).abs().max()
    return float(difference / scale.clamp_min(torch.finfo(torch.float32).tiny))
