"""The embedded engine: scheduler, runner and sampler on one thread of this process."""

from __future__ import annotations

import logging
import time
from collections import deque

import torch

from reft_core.adapter import Adapter, check_fits
from reft_core.engine.admission import as_scored, check_fits_context, check_generates, check_tokens
from reft_core.engine.choices import resolve_edits
from reft_core.engine.config import EngineConfig
from reft_core.engine.cuda_graphs import recorder_for
from reft_core.engine.deadlines import Deadlines
from reft_core.engine.host import ThreadedHost
from reft_core.engine.interface import (
    EngineStats,
    FinishReason,
    Output,
    OutputSink,
    Request,
    Ticket,
    Token,
)
from reft_core.engine.kv import SlotKV
from reft_core.engine.logprobs import finite_rows, with_logprobs
from reft_core.engine.prefix_cache import PrefixCache
from reft_core.engine.provenance import BLOCK_TOKENS, Provenance
from reft_core.engine.runner import ModelRunner
from reft_core.engine.sampler import NOT_FINITE, sample
from reft_core.engine.scheduler import Scheduler
from reft_core.engine.sequence import Sequence
from reft_core.engine.sharing import Chunk
from reft_core.engine.uploads import Uploads
from reft_core.errors import DeadlineExceeded, ReftError, RequestFailed
from reft_core.loading import LoadedModel
from reft_core.sites import ModelDescription
from reft_core.threads import run_in_own_thread

log = logging.getLogger(__name__)


class EmbeddedEngine(ThreadedHost[Sequence]):
    """Continuous batching on one CPU or GPU. Implements :class:`interface.Engine`.

    Two kinds of state, so two owners. What callers touch (inbox, cancellations, adapters,
    the open requests) is guarded by one lock. The scheduler, the KV store and every running
    sequence belong to the engine's thread alone; :meth:`step` takes the lock only to collect
    what arrived.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig = EngineConfig()) -> None:  # noqa: B008
        super().__init__(config)
        self._loaded = loaded
        self._max_model_len = min(config.max_model_len, loaded.description.max_positions)
        parameter = next(loaded.model.parameters())
        self._device = parameter.device
        self._kv, self._runner = run_in_own_thread(lambda: self._build(parameter.dtype))
        self._cache = PrefixCache(self._kv, config.prefix_cache_bytes)
        self._scheduler = Scheduler(config, self._kv, self._cache, self._runner.can_branch)
        self._deadlines = Deadlines()

        self._inbox: deque[Sequence] = deque()
        self._cancelled: set[str] = set()
        self._uploads = Uploads(self._device)
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._prefill_steps = 0
        self._decode_steps = 0

    def _build(self, dtype: torch.dtype) -> tuple[SlotKV, ModelRunner]:
        """The KV store and the runner; both touch enough memory to start OpenMP workers."""
        record = recorder_for(self._device, self._config.cuda_graphs)
        kv = SlotKV(
            self._loaded.description,
            self._config.max_num_seqs,
            self._max_model_len,
            dtype=dtype,
            device=self._device,
            spare=record is not None,
        )
        return kv, ModelRunner(self._loaded, kv, self._config.forward, record=record)

    # Called from any thread ---------------------------------------------------------------

    @property
    def model(self) -> ModelDescription:
        """The base model being served."""
        return self._loaded.description

    @property
    def max_model_len(self) -> int:
        """Most tokens a request may have, prompt and answer together."""
        return self._max_model_len

    def submit(self, request: Request, sink: OutputSink) -> Ticket:
        """Accept a request; see :meth:`interface.Engine.submit`."""
        check_tokens(request, self.model.vocab_size)
        request = as_scored(request)
        with self._changed:
            sequence = self._new_sequence(request, sink)
            self._admit(request.request_id, sequence, len(request.prompt))
            self._inbox.append(sequence)
        num_edits = sequence.edits.num_edits if sequence.edits else 0
        return Ticket(request.request_id, len(request.prompt), num_edits)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step with reason ``cancelled``; no-op if it has ended."""
        with self._changed:
            if request_id in self._open:
                self._cancelled.add(request_id)
                self._changed.notify_all()

    def load_adapter(self, adapter: Adapter) -> None:
        """Make an adapter usable by its digest; see :meth:`interface.Engine.load_adapter`."""
        check_fits(adapter.spec, self.model)
        check_generates(adapter.spec)
        if self.has_adapter(adapter.digest):
            return
        resident, arrival = self._uploads.start(adapter)
        with self._changed:
            self._uploads.wait(adapter.digest)  # of one that another thread brought meanwhile
            self._adapters[adapter.digest] = resident
            self._uploads.add(adapter.digest, arrival)

    def unload_adapter(self, digest: str) -> None:
        """Take an adapter away from new requests; running ones keep it until they end."""
        with self._changed:
            self._uploads.wait(digest)
            self._adapters.pop(digest, None)

    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step."""
        running = list(self._scheduler.running)
        adapters = list(self._adapters.values())
        graphs = self._runner.graphs
        return EngineStats(
            num_running=len(running),
            num_waiting=max(0, len(self._open) - len(running)),
            num_slots=self._kv.num_slots,
            kv_tokens_used=sum(sequence.num_computed for sequence in running),
            kv_tokens_capacity=self._scheduler.kv_tokens,
            num_resident_adapters=len(adapters),
            resident_adapter_bytes=sum(adapter.resident_bytes for adapter in adapters),
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            edits_applied_total=self._runner.num_edits_applied,
            prefill_steps_total=self._prefill_steps,
            decode_steps_total=self._decode_steps,
            cached_tokens_total=self._scheduler.num_taken_tokens,
            cached_blocks=len(self._cache),
            preemptions_total=self._scheduler.num_preemptions,
            num_decode_graphs=len(graphs) if graphs is not None else 0,
            warm_up_s=graphs.warm_up_s if graphs is not None else 0.0,
            free_cached_blocks=self._cache.num_free,
            max_cached_blocks=self._cache.num_rows,
            foreign_tokens_total=self._scheduler.num_foreign_tokens,
            kv_token_bytes=self._kv.bytes_of(1),
            block_tokens=BLOCK_TOKENS,
        )

    def _new_sequence(self, request: Request, sink: OutputSink) -> Sequence:
        """The request with its edits resolved against its prompt, if it fits into a slot."""
        for choice in request.adapters:
            self._uploads.wait(choice.digest)
        edits = resolve_edits(request, self._adapters, self._max_model_len)
        num_virtual, params = edits.num_virtual if edits else 0, request.params
        check_fits_context(len(request.prompt), params.max_tokens, num_virtual, self._max_model_len)
        stop_ids = params.stop_token_ids
        if not params.ignore_eos and not request.completion:
            stop_ids = stop_ids | self._loaded.eos_token_ids
        provenance = None
        if not any(choice.source for choice in request.adapters):  # those use the slot first
            provenance = Provenance.of(edits, len(request.prompt), request.tenant)
        return Sequence(request, sink, edits, stop_ids, provenance)

    # Called from the engine's thread alone ------------------------------------------------

    def _work(self) -> None:
        """Step while there is work; sleep while there is none."""
        while self._wait_for_work():
            self.step()

    def _wait_for_work(self) -> bool:
        """Block until a step has something to do; False when the engine is to stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._inbox or self._cancelled or self._scheduler.has_work
            )
            return not self._stopping

    def step(self) -> None:
        """One turn: take in what arrived, prefill some prompt tokens, decode a token each."""
        self._collect()
        if chunks := self._scheduler.next_prefill():
            self._note_begun(chunks)
            self._prefill(chunks)
        if rows := self._scheduler.next_decode():
            self._decode(rows)

    def _note_begun(self, chunks: list[Chunk]) -> None:
        """The prompts of these chunks wait no longer."""
        if self._waiting_tokens:
            with self._changed:
                for chunk in chunks:
                    self._leave_queue(chunk.sequence.request.request_id)

    def _collect(self) -> None:
        """Queue new sequences and end cancelled ones."""
        with self._changed:
            arrived, self._inbox = self._inbox, deque()
            cancelled = [self._open[i] for i in self._cancelled if i in self._open]
            self._cancelled.clear()
        for sequence in arrived:
            self._scheduler.add(sequence)
            if sequence.request.deadline_s is not None:
                due = sequence.submitted_at + sequence.request.deadline_s
                self._deadlines.add(sequence.request.request_id, due)
        for sequence in cancelled:
            self._finish(sequence, None, "cancelled")
        self._end_overdue()

    def _end_overdue(self) -> None:
        """End the sequences whose deadline has passed."""
        for request_id in self._deadlines.pop_overdue(time.monotonic()):
            sequence = self._open[request_id]
            deadline = sequence.request.deadline_s
            message = f"the request did not end within its deadline of {deadline} s"
            self._fail(sequence, DeadlineExceeded(message))

    def _prefill(self, chunks: list[Chunk]) -> None:
        """Prefill chunks together; if that fails, each alone, so only the guilty one ends."""
        try:
            logits = self._runner.prefill(chunks)
        except Exception as error:
            log.exception("a prefill of %d chunks failed", len(chunks))
            if len(chunks) > 1:
                for chunk in chunks:
                    self._prefill([chunk.alone()])
            else:
                self._fail(chunks[0].sequence, RequestFailed(f"prefill failed: {error}"))
            return
        self._prefill_steps += 1
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
            self._cache.store(chunk.sequence, tail=chunk.completes_prompt)
            self._prompt_tokens += chunk.end - chunk.start - chunk.num_shared
        wanting = [chunk.sequence for chunk in chunks if chunk.wants_token]
        self._score_prompts(logits.scored, [chunk for chunk in chunks if chunk.scored])
        for chunk in chunks:
            if chunk.completes_prompt and not chunk.wants_token and chunk.sequence.slot >= 0:
                self._finish(chunk.sequence, None, "length")
        kept = [row for row, sequence in enumerate(wanting) if sequence.slot >= 0]
        rows = logits.next if len(kept) == len(wanting) else logits.next[kept]
        self._take_tokens(rows, [wanting[row] for row in kept])

    def _score_prompts(self, logits: torch.Tensor, chunks: list[Chunk]) -> None:
        """Note the log-probabilities of prompts' tokens; logits (S, V) are of the positions that
        the chunks score, in order. A prompt whose logits are not finite ends.
        """
        end = 0
        for chunk in chunks:
            sequence, start = chunk.sequence, end
            end += len(chunk.scored)
            try:
                _score_prompt(chunk, logits[start:end])
            except Exception as error:
                self._cache.forget(sequence)
                self._fail(sequence, RequestFailed(f"scoring the prompt failed: {error}"))

    def _decode(self, rows: list[Sequence]) -> None:
        """Decode one token for every ready sequence among ``rows``; if that fails, for each
        alone, so only the guilty one ends."""
        ready = [sequence for sequence in rows if sequence.is_prefilled]
        try:
            logits = self._runner.decode(rows)
        except Exception:
            log.exception("a decode of %d sequences failed", len(ready))
            for sequence in ready:
                self._decode_alone(sequence)
            return
        self._decode_steps += 1
        if len(ready) < len(rows):
            logits = logits[[sequence.slot for sequence in ready]]
        for sequence in ready:
            sequence.num_computed += 1
        self._take_tokens(logits, ready)

    def _decode_alone(self, sequence: Sequence) -> None:
        """Decode one sequence's token, the rows before its own left idle."""
        try:
            rows = self._scheduler.running[: sequence.slot + 1]
            logits = self._runner.decode(rows, only=sequence)
        except Exception as error:
            self._fail(sequence, RequestFailed(f"decode failed: {error}"))
            return
        self._decode_steps += 1
        sequence.num_computed += 1
        self._take_tokens(logits[-1:], [sequence])

    def _take_tokens(self, logits: torch.Tensor, sequences: list[Sequence]) -> None:
        """Sample each sequence's next token, deliver it, and end those that are done."""
        if not sequences:
            return
        taken = zip(sequences, sample(logits, sequences), strict=True)
        # The last slot first: of sequences that end together, none moves into another's slot.
        for sequence, token in sorted(taken, key=lambda pair: -pair[0].slot):
            if isinstance(token, RequestFailed):
                self._cache.forget(sequence)
                if not self._scheduler.start_over(sequence):
                    self._fail(sequence, token)
                continue
            self._generated_tokens += 1
            self._scheduler.charge(sequence, 1)
            sequence.token_ids.append(token.token_id)
            if not sequence.first_token_at:
                sequence.first_token_at = time.monotonic()
            try:
                reason = _end_after(sequence, token)
            except Exception as error:
                self._fail(sequence, RequestFailed(f"the request's constraint failed: {error}"))
                continue
            if reason is not None:
                self._finish(sequence, token, reason)
            else:
                self._deliver(sequence, _output(sequence, token))

    def _fail(self, sequence: Sequence, error: ReftError) -> None:
        """End one sequence with its error."""
        self._finish(sequence, None, "error", error)

    def _finish(
        self,
        sequence: Sequence,
        token: Token | None,
        reason: FinishReason,
        error: ReftError | None = None,
    ) -> None:
        """Free a sequence's slot and deliver its last output."""
        if sequence.slot >= 0 and error is None:
            self._cache.store(sequence, tail=True)
        self._scheduler.remove(sequence)
        self._close(sequence, token, reason, error)

    def _close(
        self,
        sequence: Sequence,
        token: Token | None,
        reason: FinishReason,
        error: ReftError | None,
    ) -> None:
        """Deliver the last output and forget the request."""
        self._deliver(sequence, _output(sequence, token, reason, error))
        request_id = sequence.request.request_id
        self._deadlines.remove(request_id)
        with self._changed:
            self._open.pop(request_id, None)
            self._leave_queue(request_id)
            self._cancelled.discard(request_id)  # its id may come again
            self._changed.notify_all()

    def _deliver(self, sequence: Sequence, output: Output) -> None:
        """Hand an output to its sink. A sink that raises loses its outputs, nobody else's."""
        try:
            sequence.sink(output)
        except Exception:
            log.exception("the sink of request %s raised", output.request_id)
            self.cancel(output.request_id)

    def _abandon(self, sequence: Sequence, error: ReftError) -> None:
        """End an open request with ``error``; the engine's thread is gone or going."""
        self._close(sequence, None, "error", error)


def _score_prompt(chunk: Chunk, logits: torch.Tensor) -> None:
    """Note log-probabilities from the logits (S, V) of the positions that a chunk scores."""
    if not all(finite_rows(logits)):
        raise ValueError(NOT_FINITE)
    sequence = chunk.sequence
    token_ids = [sequence.token_ids[position + 1] for position in chunk.scored]
    num_top = [sequence.request.params.prompt_logprobs or 0] * len(token_ids)
    sequence.prompt_logprobs += with_logprobs(logits, token_ids, num_top, ranked=True)


def _end_after(sequence: Sequence, token: Token) -> FinishReason | None:
    """Why a sequence ends with the token it has just got; None if it goes on.

    Tells its constraint. Raises what that raises.
    """
    if token.token_id in sequence.stop_ids:
        return "stop"
    request = sequence.request
    if request.constraint is not None:
        request.constraint.accept(token.token_id)
        if request.constraint.is_finished:
            return "stop"
    return "length" if sequence.num_generated == request.params.max_tokens else None


def _output(
    sequence: Sequence,
    token: Token | None,
    reason: FinishReason | None = None,
    error: ReftError | None = None,
) -> Output:
    """What happened to a sequence in this step; it has ended if there is a reason."""
    is_first = sequence.num_generated == (0 if token is None else 1)
    was_answered = reason not in ("cancelled", "error")
    return Output(
        sequence.request.request_id,
        token,
        reason,
        error,
        None if reason is None else sequence.timings(time.monotonic()),
        sequence.num_cached_prompt_tokens,
        completes_constraint=reason == "stop"
        and token is not None
        and token.token_id not in sequence.stop_ids,
        prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first and was_answered else (),
    )
