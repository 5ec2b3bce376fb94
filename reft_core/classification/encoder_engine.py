"""The thread that runs an encoder: token ids in, logits of each text's own head out.

What waits is read together, whatever adapters and heads the texts have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reft_core.adapter import Adapter, check_fits
from reft_core.batch import PromptEdits
from reft_core.classification.heads import HeadedEncoder
from reft_core.encoder import MAX_BATCH_TOKENS, EncoderRequest
from reft_core.engine.admission import check_length
from reft_core.engine.choices import as_use
from reft_core.engine.config import EngineConfig
from reft_core.engine.host import ThreadedHost
from reft_core.engine.interface import AdapterChoice, EngineStats, Ticket
from reft_core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ReftError,
    RequestFailed,
)
from reft_core.loading import LoadedModel
from reft_core.sites import ModelDescription

LogitsSink = Callable[[Tensor | ReftError], None]
"""Receives a text's float32 logits (L,), or what went wrong, once, on the engine's thread."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """An accepted text."""

    request_id: str
    request: EncoderRequest
    sink: LogitsSink
    deadline_s: float | None
    num_edits: int
    submitted_at: float = field(default_factory=time.monotonic)


class EncoderEngine(ThreadedHost[_Waiting]):
    """Texts of many callers through one frozen encoder. An :class:`interface.AdapterHost`.

    The thread holds the lock it shares with callers only to take what waits.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        *,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        super().__init__(config)
        self._device = loaded.model.device
        self._heads = HeadedEncoder(loaded, max_batch_tokens=max_batch_tokens)
        self._waiting: dict[str, _Waiting] = {}
        self._num_tokens = 0
        self._num_edits = 0
        self._num_steps = 0

    @property
    def model(self) -> ModelDescription:
        """The encoder being served."""
        return self._heads.encoder.model

    @property
    def max_model_len(self) -> int:
        """Most tokens of a text."""
        return min(self._config.max_model_len, self._heads.encoder.max_tokens)

    def submit(
        self,
        request_id: str,
        tokens: Sequence[int],
        adapters: Sequence[AdapterChoice],
        sink: LogitsSink,
        deadline_s: float | None = None,
        segments: Sequence[int] = (),
    ) -> Ticket:
        """Accept a text in tokens, exactly one of whose adapters has a head.

        ``segments`` as in :class:`EncoderRequest`.

        Raises without calling ``sink``: :class:`InvalidRequest`, :class:`PromptTooLong`,
        :class:`EngineOverloaded`, :class:`EngineUnavailable`.
        """
        check_length("input", len(tokens), self.max_model_len)
        uses = tuple(as_use(choice, self._adapters) for choice in adapters)
        for use in uses:
            if use.source:
                raise InvalidRequest.because("source", use.source, "none on an encoder")
        request = EncoderRequest(tuple(tokens), uses, tuple(segments))
        self._heads.check(request)
        num_edits = PromptEdits(uses, len(tokens), reads="all").num_edits
        waiting = _Waiting(request_id, request, sink, deadline_s, num_edits)
        with self._changed:
            self._admit(request_id, waiting, len(tokens))
            self._waiting[request_id] = waiting
        return Ticket(request_id, len(tokens), num_edits)

    def cancel(self, request_id: str) -> None:
        """Drop a text: its sink is not called any more."""
        with self._changed:
            self._waiting.pop(request_id, None)
            self._open.pop(request_id, None)
            self._leave_queue(request_id)
            self._changed.notify_all()

    def load_adapter(self, adapter: Adapter) -> None:
        """Make an adapter usable by its digest; see :meth:`AdapterHost.load_adapter`."""
        check_fits(adapter.spec, self.model)
        if not self.has_adapter(adapter.digest):
            self._adapters[adapter.digest] = adapter.to(self._device)

    def unload_adapter(self, digest: str) -> None:
        """Take an adapter away from new texts; those accepted keep it."""
        self._adapters.pop(digest, None)

    def stats(self) -> EngineStats:
        """Counters and gauges; an encoder generates nothing and keeps no keys and values."""
        adapters = list(self._adapters.values())
        num_open, num_waiting = len(self._open), len(self._waiting)
        return EngineStats(
            num_running=max(0, num_open - num_waiting),
            num_waiting=num_waiting,
            num_slots=self._config.max_open,
            kv_tokens_used=0,
            kv_tokens_capacity=0,
            num_resident_adapters=len(adapters),
            resident_adapter_bytes=sum(adapter.resident_bytes for adapter in adapters),
            prompt_tokens_total=self._num_tokens,
            generated_tokens_total=0,
            edits_applied_total=self._num_edits,
            prefill_steps_total=self._num_steps,
            decode_steps_total=0,
            cached_tokens_total=0,
            cached_blocks=0,
            preemptions_total=0,
            free_cached_blocks=0,
            max_cached_blocks=0,
        )

    # Called from the engine's thread alone ------------------------------------------------

    def _work(self) -> None:
        """Read what waits, together."""
        while waiting := self._take():
            requests = [each.request for each in waiting]
            for places in self._heads.encoder.batches(requests):
                self._read([waiting[place] for place in places])

    def _take(self) -> list[_Waiting]:
        """Block until texts wait, and take all of them; none when the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting)
            taken, self._waiting = self._waiting, {}
            for request_id in taken:
                self._leave_queue(request_id)
            return [] if self._stopping else list(taken.values())

    def _read(self, batch: Sequence[_Waiting]) -> None:
        """One forward; if it fails, each text alone, so that only the guilty one ends."""
        batch = [each for each in batch if self._still_wanted(each)]
        if not batch:
            return
        try:
            found = self._heads.logits([each.request for each in batch])
        except Exception as error:
            log.exception("a batch of %d texts failed", len(batch))
            if len(batch) == 1:
                self._end(batch[0], RequestFailed(f"the forward failed: {error}"))
            else:
                for each in batch:
                    self._read([each])
            return
        self._num_steps += 1
        for each, logits in zip(batch, found, strict=True):
            self._num_tokens += len(each.request.tokens)
            self._num_edits += each.num_edits
            finite = bool(torch.isfinite(logits).all())
            self._end(each, logits if finite else RequestFailed("the logits are not finite"))

    def _still_wanted(self, each: _Waiting) -> bool:
        """Whether a text is neither cancelled, nor the engine stopping, nor its time up."""
        if self._stopping or self._open.get(each.request_id) is not each:
            return False
        limit = each.deadline_s
        if limit is None or time.monotonic() < each.submitted_at + limit:
            return True
        message = f"the request did not end within its deadline of {limit} s"
        self._end(each, DeadlineExceeded(message))
        return False

    def _end(self, each: _Waiting, outcome: Tensor | ReftError) -> None:
        """Hand an outcome to its sink, unless the text was cancelled."""
        with self._changed:
            wanted = self._open.get(each.request_id) is each
            if wanted:
                del self._open[each.request_id]
                self._leave_queue(each.request_id)
            self._changed.notify_all()
        if not wanted:
            return
        try:
            each.sink(outcome)
        except Exception:
            log.exception("the sink of request %s raised", each.request_id)

    def _abandon(self, waiting: _Waiting, error: ReftError) -> None:
        """End an open text with ``error``; the engine's thread is gone or going."""
        self._end(waiting, error)
