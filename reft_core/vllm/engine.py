"""The engine over vLLM: our requests on its ``AsyncLLM``, for many devices and nodes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from reft_core.adapter import Adapter, check_fits, encode_adapter
from reft_core.engine.admission import as_scored, check_fits_context, check_generates, check_tokens
from reft_core.engine.choices import resolve_edits
from reft_core.engine.config import EngineConfig
from reft_core.engine.host import Host
from reft_core.engine.interface import (
    EngineStats,
    FinishReason,
    Output,
    OutputSink,
    Request,
    Ticket,
)
from reft_core.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    ReftError,
    RequestFailed,
    UnsupportedFeature,
)
from reft_core.loading import Dtype, LoadedModel
from reft_core.sites import ModelDescription
from reft_core.vllm import arguments
from reft_core.vllm.arguments import VllmOptions
from reft_core.vllm.catalog import check_servable
from reft_core.vllm.counters import Counters
from reft_core.vllm.loading import load_adapter_async, unload_adapter_async
from reft_core.vllm.loop import LoopThread
from reft_core.vllm.outputs import to_outputs
from reft_core.vllm.running import Running
from reft_core.vllm.sampling import only_reads, prompt_of, to_vllm
from reft_core.vllm.settings import Settings

log = logging.getLogger(__name__)

_STOP_S = 60.0
"""Longest that requests and processes are given to end when the engine stops."""


@dataclass
class _Held:
    """An adapter that vLLM's workers have."""

    file_digest: str
    """Of the file they were sent, which is written anew: where another program wrote the adapter's
    own, its bytes may differ, and so this from the adapter's digest."""
    num_users: int = 0
    """Open requests that need it."""


class VllmEngine(Host[Running]):
    """vLLM, in processes of its own. Implements :class:`interface.Engine`.

    ``AsyncLLM`` lives on an asyncio loop whose thread is the engine's. What callers touch is
    guarded by one lock, which the loop takes only to take in what arrived and to close requests.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: str,
        dtype: Dtype,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        options: VllmOptions = VllmOptions(),  # noqa: B008
    ) -> None:
        """Starts vLLM's processes, and waits until they have loaded the model.

        ``model`` is a folder or a hub id; of ``loaded``, the weights are not used. Raises
        :class:`InvalidRequest` for arguments that vLLM refuses, :class:`UnsupportedModel` if it
        cannot start.
        """
        super().__init__(config)
        arguments.prepare_environment()
        args = arguments.engine_args(model, loaded, dtype, config, options)
        self._loaded = loaded
        self._max_model_len = arguments.context_of(config, loaded.description)
        self._itemsize = getattr(torch, dtype).itemsize
        self._counters = Counters()
        self._num_edits_applied = 0
        self._held: dict[str, _Held] = {}
        self._unloading: set[asyncio.Future[None]] = set()
        self._inbox: deque[Running] = deque()
        self._started = False
        self._vllm_config = arguments.vllm_config(args)
        self._sites = Settings.of(self._vllm_config).sites
        self._loop = LoopThread("reft-vllm")
        try:
            self._llm: AsyncLLM = self._loop.call(self._build())
        except Exception as error:
            self._loop.close()
            if isinstance(error, ReftError):
                raise
            raise arguments.unstartable(error) from error

    async def _build(self) -> AsyncLLM:
        """On the loop, which its sockets then belong to."""
        return AsyncLLM.from_vllm_config(
            self._vllm_config,
            stat_loggers=[self._counters.logger()],
            disable_log_stats=True,
            enable_log_requests=False,
        )

    # Called from any thread ---------------------------------------------------------------

    @property
    def model(self) -> ModelDescription:
        """The base model being served."""
        return self._loaded.description

    @property
    def max_model_len(self) -> int:
        """Most tokens a request may have, prompt and answer together."""
        return self._max_model_len

    @property
    def healthy(self) -> bool:
        """False once one of vLLM's processes has died, or the engine was stopped."""
        return super().healthy and not self._llm.errored

    def submit(self, request: Request, sink: OutputSink) -> Ticket:
        """Accept a request; see :meth:`interface.Engine.submit`."""
        check_tokens(request, self.model.vocab_size)
        if request.constraint is not None and self._vllm_config.model_config.skip_tokenizer_init:
            raise UnsupportedFeature(
                "constraint: vLLM constrains answers by a fast tokenizer, which this model has "
                "not; the embedded engine (reft serve --engine embedded) needs none",
                field="constraint",
            )
        request = as_scored(request)
        with self._changed:
            edits = resolve_edits(request, self._adapters, self._max_model_len)
            num_prompt, num_edits = len(request.prompt), edits.num_edits if edits else 0
            self._check_length(request)
            running = Running(request, sink, num_edits, self._params(request))
            self._admit(request.request_id, running, num_prompt)
            for choice in request.adapters:
                self._held[choice.digest].num_users += 1
            self._inbox.append(running)
        self._loop.soon(self._take_in)
        return Ticket(request.request_id, num_prompt, num_edits)

    def cancel(self, request_id: str) -> None:
        """End a request with reason ``cancelled``; no-op if it has ended."""
        with self._changed:
            running = self._open.get(request_id)
        if running is not None:
            self._loop.soon(self._end_early, running, "cancelled")

    def load_adapter(self, adapter: Adapter) -> None:
        """Make an adapter usable by its digest, in every worker of vLLM.

        Raises :class:`AdapterMismatch` if it was made for another base model, and
        :class:`UnsupportedFeature` if only the embedded engine can run it.
        """
        check_fits(adapter.spec, self.model)
        check_generates(adapter.spec)
        check_servable(adapter.spec, self._sites)
        bare = adapter.to("meta")  # its tensors are the workers' affair
        with self._changed:
            if adapter.digest in self._held:
                self._adapters[adapter.digest] = bare
                return
        file = encode_adapter(adapter.spec, adapter.edits)
        digest = self._loop.call(load_adapter_async(self._llm, file))
        with self._changed:
            self._held.setdefault(adapter.digest, _Held(digest))
            self._adapters[adapter.digest] = bare

    def unload_adapter(self, digest: str) -> None:
        """Take an adapter away from new requests; running ones keep it until they end."""
        with self._changed:
            self._adapters.pop(digest, None)
            self._let_go(digest)

    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step. Of its prefix cache vLLM tells the hits alone,
        and of prompts those that were read to their end."""
        return self._counters.stats(
            self._vllm_config,
            self.model,
            token_bytes=self._itemsize,
            num_open=len(self._open),
            adapters=list(self._adapters.values()),
            num_edits_applied=self._num_edits_applied,
        )

    def start(self) -> None:
        """Begin with requests; those submitted before wait for it."""
        self._started = True
        self._loop.soon(self._take_in)

    def stop(self) -> None:
        """End vLLM's processes; requests still open get an :class:`EngineUnavailable` output."""
        with self._changed:
            was_stopping, self._stopping = self._stopping, True
            self._changed.notify_all()
        if not was_stopping:
            try:
                self._loop.call(self._shut_down(), _STOP_S)
            except TimeoutError:
                log.warning("vLLM did not end within %s s", _STOP_S)
            self._loop.close()
        self._abandon_open(EngineUnavailable("the engine was stopped"))

    def _params(self, request: Request) -> Any:
        """vLLM's sampling parameters. Adapters are named by the files that the workers have."""
        stop_ids = request.params.stop_token_ids
        if only_reads(request):
            stop_ids = frozenset()
        elif not request.params.ignore_eos:
            stop_ids = stop_ids | self._loaded.eos_token_ids
        named = tuple(
            replace(choice, digest=self._held[choice.digest].file_digest)
            for choice in request.adapters
        )
        return to_vllm(replace(request, adapters=named), stop_ids)

    def _check_length(self, request: Request) -> None:
        """Refuse a request that does not fit the context, in tokens."""
        num_prompt, max_tokens = len(request.prompt), request.params.max_tokens
        # A prompt that is only read is followed by a token nevertheless, which nobody is shown.
        most = self._max_model_len
        if only_reads(request):
            most = min(most, self._vllm_config.model_config.max_model_len - 1)
        check_fits_context(num_prompt, max_tokens, 0, most)

    # Called on the loop's thread alone ------------------------------------------------------

    def _take_in(self) -> None:
        """Begin with the requests that have arrived, once the engine has been started."""
        with self._changed:
            if not self._started:
                return
            arrived, self._inbox = self._inbox, deque()
        for running in arrived:
            if running.has_ended:
                continue
            running.task = asyncio.ensure_future(self._serve(running))
            running.task.add_done_callback(partial(self._served, running))
            running.start_clock(self._loop.loop, self._expire)

    async def _serve(self, running: Running) -> None:
        """Deliver a request's outputs as vLLM makes them."""
        request = running.request
        prompt = tokens_input(prompt_of(request), cache_salt=request.tenant or None)
        deltas = self._llm.generate(
            prompt, running.params, request.request_id, priority=request.priority
        )
        async with aclosing(deltas):
            async for delta in deltas:
                is_first = not running.begun_at
                if is_first:
                    self._note_begun(running)
                running.note(delta.metrics)
                for output in to_outputs(request, delta, is_first=is_first):
                    self._deliver(running, output)

    def _note_begun(self, running: Running) -> None:
        """A request's prompt has been read."""
        running.begun_at = time.monotonic()
        self._num_edits_applied += running.num_edits
        with self._changed:
            self._leave_queue(running.request.request_id)

    def _served(self, running: Running, task: asyncio.Future[None]) -> None:
        """See to it that a request whose task has ended was told so."""
        if running.has_ended:
            return
        if running.ending is not None:
            reason, error = running.ending
            self._finish(running, reason, error)
            return
        problem = None if task.cancelled() else task.exception()
        if isinstance(problem, ReftError):
            error = problem
        elif isinstance(problem, EngineDeadError) or self._llm.errored:
            error = EngineUnavailable(f"the engine died: {problem}")
        elif isinstance(problem, VLLMClientError):
            error = InvalidRequest(f"vLLM refused the request: {problem}")
        else:
            log.error("request %s failed", running.request.request_id, exc_info=problem)
            error = RequestFailed(f"vLLM failed: {problem}")
        self._finish(running, "error", error)

    def _expire(self, running: Running) -> None:
        """End a request whose deadline has passed."""
        deadline = running.request.deadline_s
        message = f"the request did not end within its deadline of {deadline} s"
        self._end_early(running, "error", DeadlineExceeded(message))

    def _end_early(
        self, running: Running, reason: FinishReason, error: ReftError | None = None
    ) -> None:
        """Have a request end before vLLM has ended it; no-op if it is ending already."""
        if running.has_ended or running.ending is not None:
            return
        running.ending = reason, error
        if running.task is None:
            self._finish(running, reason, error)
        else:
            running.task.cancel()

    def _finish(
        self, running: Running, reason: FinishReason, error: ReftError | None = None
    ) -> None:
        """Deliver a last output that vLLM knows nothing of."""
        self._deliver(running, Output(running.request.request_id, None, reason, error))

    def _deliver(self, running: Running, output: Output) -> None:
        """Hand an output to its sink, and forget the request if it was the last. A sink that
        raises loses its outputs, nobody else's."""
        if running.has_ended:
            return
        if output.finish_reason is not None:
            running.has_ended = True
            output = replace(output, timings=running.timings(time.monotonic()))
        try:
            running.sink(output)
        except Exception:
            log.exception("the sink of request %s raised", output.request_id)
            self._end_early(running, "cancelled")
        if running.has_ended:
            self._close(running)

    def _close(self, running: Running) -> None:
        """Forget a request that has ended."""
        running.stop_clock()
        with self._changed:
            self._open.pop(running.request.request_id, None)
            self._leave_queue(running.request.request_id)
            for choice in running.request.adapters:
                self._held[choice.digest].num_users -= 1
                self._let_go(choice.digest)
            self._changed.notify_all()

    def _let_go(self, digest: str) -> None:
        """Have the workers drop an adapter that was taken away and that nobody uses any more; the
        caller holds the lock."""
        held = self._held.get(digest)
        if held is not None and not held.num_users and digest not in self._adapters:
            del self._held[digest]
            self._loop.soon(self._unload, held.file_digest)

    def _unload(self, file_digest: str) -> None:
        """Tell the workers; nobody waits for their answer."""
        if not self._llm.errored:
            task = asyncio.ensure_future(unload_adapter_async(self._llm, file_digest))
            self._unloading.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self._unloaded)

    def _unloaded(self, task: asyncio.Future[None]) -> None:
        """Forget the call, but for what went wrong."""
        self._unloading.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("vLLM's workers did not unload an adapter", exc_info=task.exception())

    async def _shut_down(self) -> None:
        """End every request, then vLLM."""
        with self._changed:
            open_ = list(self._open.values())
        for running in open_:
            self._end_early(running, "error", EngineUnavailable("the engine was stopped"))
        tasks = [running.task for running in open_ if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_S / 2)
        self._llm.shutdown()
        del self._llm  # at the interpreter's end it would be too late for its own clearing up

    def _abandon(self, request: Running, error: ReftError) -> None:
        """End an open request with ``error``; the loop is gone."""
        self._finish(request, "error", error)
