"""The engine over vLLM: our requests on its ``AsyncLLM``, for many devices and nodes."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from reft_core.adapter import Adapter, check_fits, encode_adapter
from reft_core.engine.admission import as_scored, check_fits_context, check_generates, check_tokens
from reft_core.engine.choices import resolve_edits
from reft_core.engine.config import EngineConfig
from reft_core.engine.host import Host
from reft_core.engine.interface import EngineStats, OutputSink, Request, Ticket
from reft_core.errors import EngineUnavailable, ReftError, UnsupportedFeature
from reft_core.loading import Dtype, LoadedModel
from reft_core.sites import ModelDescription
from reft_core.vllm import arguments
from reft_core.vllm.arguments import VllmOptions
from reft_core.vllm.catalog import check_servable
from reft_core.vllm.counters import Counters
from reft_core.vllm.delivery import Delivery
from reft_core.vllm.holdings import Holdings
from reft_core.vllm.loading import load_adapter_async, unload_adapter_async
from reft_core.vllm.loop import LoopThread
from reft_core.vllm.running import Running
from reft_core.vllm.sampling import only_reads, to_vllm
from reft_core.vllm.settings import Settings

log = logging.getLogger(__name__)

_STOP_S = 60.0
"""Longest that requests and processes are given to end when the engine stops."""
_LOOK_S = 1.0
"""Between two looks at whether vLLM still lives, while its workers are to answer."""


class VllmEngine(Host[Running]):
    """vLLM, in processes of its own. Implements :class:`interface.Engine`.

    ``AsyncLLM`` lives on an asyncio loop whose thread is the engine's. What callers touch is
    guarded by one lock, which the loop takes only to take in what arrived and to close requests.
    See :class:`Delivery` for what happens there.
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
        self._holdings = Holdings(self._send, self._drop)
        self._files: dict[str, str] = {}
        """The digests of the files that the workers have, by those of loaded adapters."""
        self._inbox: deque[Running] = deque()
        self._started = False
        self._vllm_config = arguments.vllm_config(args)
        self._sites = Settings.of(self._vllm_config).sites
        self._loop = LoopThread("reft-vllm")
        try:
            llm = self._loop.call(self._build())
        except Exception as error:
            self._loop.close()
            if isinstance(error, ReftError):
                raise
            raise arguments.unstartable(error) from error
        self._delivery = Delivery(llm, self._counters, self._has_begun, self._has_ended)

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
        return super().healthy and not self._delivery.llm.errored

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
            files = tuple(self._files[choice.digest] for choice in request.adapters)
            running = Running(request, sink, num_edits, self._params(request, files), files)
            self._admit(request.request_id, running, num_prompt)
            self._holdings.need(files)
            self._inbox.append(running)
        self._loop.soon(self._take_in)
        return Ticket(request.request_id, num_prompt, num_edits)

    def cancel(self, request_id: str) -> None:
        """End a request with reason ``cancelled``; no-op if it has ended."""
        with self._changed:
            running = self._open.get(request_id)
        if running is not None:
            self._loop.soon(self._delivery.end_early, running, "cancelled")

    def load_adapter(self, adapter: Adapter) -> None:
        """Make an adapter usable by its digest, in every worker of vLLM.

        Raises :class:`AdapterMismatch` if it was made for another base model,
        :class:`UnsupportedFeature` if only the embedded engine can run it, and
        :class:`EngineUnavailable` once vLLM has died or was stopped.
        """
        check_fits(adapter.spec, self.model)
        check_generates(adapter.spec)
        check_servable(adapter.spec, self._sites)
        if self.has_adapter(adapter.digest):
            return
        file_digest = self._holdings.load(encode_adapter(adapter.spec, adapter.edits))
        with self._changed:
            if adapter.digest in self._files:  # another thread has been as quick
                self._holdings.let_go([file_digest])
            self._files[adapter.digest] = file_digest
            self._adapters[adapter.digest] = adapter.to("meta")  # tensors are the workers' affair

    def unload_adapter(self, digest: str) -> None:
        """Take an adapter away from new requests; running ones keep it until they end."""
        with self._changed:
            if self._adapters.pop(digest, None) is not None:
                self._holdings.let_go([self._files.pop(digest)])

    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step. Of its prefix cache vLLM tells the hits alone,
        and of prompts those that were read to their end."""
        return self._counters.stats(
            self._vllm_config,
            self.model,
            token_bytes=self._itemsize,
            num_open=len(self._open),
            adapters=list(self._adapters.values()),
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
            with self._changed:
                open_ = list(self._open.values())
            try:
                self._loop.call(self._delivery.shut_down(open_, _STOP_S / 2), _STOP_S)
            except TimeoutError:
                log.warning("vLLM did not end within %s s", _STOP_S)
            self._loop.close()
        self._abandon_open(EngineUnavailable("the engine was stopped"))

    def _params(self, request: Request, files: Sequence[str]) -> Any:
        """vLLM's sampling parameters; the workers know the adapters by these digests."""
        stop_ids = request.params.stop_token_ids
        if only_reads(request):
            stop_ids = frozenset()
        elif not request.params.ignore_eos:
            stop_ids = stop_ids | self._loaded.eos_token_ids
        named = tuple(
            replace(choice, digest=file)
            for choice, file in zip(request.adapters, files, strict=True)
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

    def _send(self, file: bytes) -> None:
        """Have every worker hold a file. Raises :class:`EngineUnavailable`, or its refusal."""
        if not self.healthy:
            raise EngineUnavailable("the engine has ended and takes no adapters")
        try:
            self._loop.call(self._load(file))
        except EngineDeadError as error:
            raise EngineUnavailable(f"the engine died: {error}") from error

    def _drop(self, file_digest: str) -> None:
        """Have the workers hold a file no longer; nobody waits for their answer."""
        if self.healthy:
            work = unload_adapter_async(self._delivery.llm, file_digest)
            self._loop.spawn(work).add_done_callback(_log_failure)

    def _abandon(self, request: Running, error: ReftError) -> None:
        """End an open request with ``error``; the loop is gone."""
        self._delivery.finish(request, "error", error)

    # Called on the loop's thread alone ------------------------------------------------------

    async def _load(self, file: bytes) -> None:
        """Wait for the workers' answer, which vLLM owes for ever if it dies before."""
        llm = self._delivery.llm
        task = asyncio.ensure_future(load_adapter_async(llm, file))
        while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
            if llm.errored:
                task.cancel()
                raise EngineDeadError
        task.result()

    def _take_in(self) -> None:
        """Begin with the requests that have arrived, once the engine has been started."""
        with self._changed:
            if not self._started:
                return
            arrived, self._inbox = self._inbox, deque()
        for running in arrived:
            self._delivery.begin(running)

    def _has_begun(self, running: Running) -> None:
        with self._changed:
            self._leave_queue(running.request.request_id)

    def _has_ended(self, running: Running) -> None:
        """Forget a request, and what it needed."""
        with self._changed:
            self._open.pop(running.request.request_id, None)
            self._leave_queue(running.request.request_id)
            self._holdings.let_go(running.files)
            self._changed.notify_all()


def _log_failure(unloading: Future[None]) -> None:
    """Tell of what went wrong while nobody waited."""
    if not unloading.cancelled() and unloading.exception() is not None:
        log.error("vLLM's workers did not unload an adapter", exc_info=unloading.exception())
