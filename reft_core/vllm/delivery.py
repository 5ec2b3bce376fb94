"""From vLLM's outputs to the sinks of requests, on the loop that vLLM lives on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from reft_core.engine.interface import FinishReason, Output
from reft_core.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    ReftError,
    RequestFailed,
)
from reft_core.vllm.counters import Counters
from reft_core.vllm.outputs import to_outputs
from reft_core.vllm.running import Running
from reft_core.vllm.sampling import prompt_of

log = logging.getLogger(__name__)


class Delivery:
    """Runs requests, each of which gets one last output. Called on the loop's thread alone, but
    for :attr:`llm`."""

    def __init__(
        self,
        llm: AsyncLLM,
        counters: Counters,
        has_begun: Callable[[Running], None],
        has_ended: Callable[[Running], None],
    ) -> None:
        """``has_begun`` is told when a request's prompt has been read, ``has_ended`` once it has
        had its last output."""
        self.llm = llm
        self._counters = counters
        self._has_begun = has_begun
        self._has_ended = has_ended

    def begin(self, running: Running) -> None:
        """Run a request, unless it has ended before."""
        if running.has_ended:
            return
        running.task = asyncio.ensure_future(self._run(running))
        running.task.add_done_callback(partial(self._ran, running))
        running.start_clock(self._expire)

    def end_early(
        self, running: Running, reason: FinishReason, error: ReftError | None = None
    ) -> None:
        """Have a request end before vLLM has ended it; no-op if it is ending already."""
        if running.has_ended or running.ending is not None:
            return
        running.ending = reason, error
        if running.task is None:
            self.finish(running, reason, error)
        else:
            running.task.cancel()

    def finish(
        self, running: Running, reason: FinishReason, error: ReftError | None = None
    ) -> None:
        """Deliver a last output that vLLM knows nothing of."""
        self._deliver(running, Output(running.request.request_id, None, reason, error))

    async def shut_down(self, open_: Iterable[Running], wait_s: float) -> None:
        """End these requests, then vLLM."""
        for running in open_:
            self.end_early(running, "error", EngineUnavailable("the engine was stopped"))
        tasks = [running.task for running in open_ if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=wait_s)
        self.llm.shutdown()
        del self.llm  # at the interpreter's end it would be too late for its own clearing up

    async def _run(self, running: Running) -> None:
        """Deliver a request's outputs as vLLM makes them."""
        request = running.request
        prompt = tokens_input(prompt_of(request), cache_salt=request.tenant or None)
        deltas = self.llm.generate(
            prompt, running.params, request.request_id, priority=request.priority
        )
        async with aclosing(deltas):
            async for delta in deltas:
                is_first = not running.begun_at
                if is_first:
                    running.begun_at = time.monotonic()
                    self._counters.count_prompt(running, delta.num_cached_tokens or 0)
                    self._has_begun(running)
                running.note(delta.metrics)
                for output in to_outputs(request, delta, is_first=is_first):
                    self._deliver(running, output)

    def _ran(self, running: Running, task: asyncio.Future[None]) -> None:
        """See to it that a request whose task has ended was told so."""
        if running.has_ended:
            return
        if running.ending is not None:
            self.finish(running, *running.ending)
            return
        problem = None if task.cancelled() else task.exception()
        if isinstance(problem, ReftError):
            error = problem
        elif isinstance(problem, EngineDeadError) or self.llm.errored:
            error = EngineUnavailable(f"the engine died: {problem}")
        elif isinstance(problem, VLLMClientError):
            error = refusal(problem)
        else:
            log.error("request %s failed", running.request.request_id, exc_info=problem)
            error = RequestFailed(f"vLLM failed: {problem}")
        self.finish(running, "error", error)

    def _expire(self, running: Running) -> None:
        """End a request whose deadline has passed."""
        deadline = running.request.deadline_s
        message = f"the request did not end within its deadline of {deadline} s"
        self.end_early(running, "error", DeadlineExceeded(message))

    def _deliver(self, running: Running, output: Output) -> None:
        """Hand an output to its sink, and forget the request if it was the last. A sink that
        raises loses its outputs, nobody else's."""
        if running.has_ended:
            return
        self._counters.generated_tokens += output.token is not None
        if output.finish_reason is not None:
            running.has_ended = True
            output = replace(output, timings=running.timings(time.monotonic()))
        try:
            running.sink(output)
        except Exception:
            log.exception("the sink of request %s raised", output.request_id)
            self.end_early(running, "cancelled")
        if running.has_ended:
            running.stop_clock()
            self._has_ended(running)


def refusal(problem: VLLMClientError) -> InvalidRequest:
    """Our error for a request that vLLM refused, about the field that it named."""
    reason = problem.args[0] if problem.args else type(problem).__name__
    field = getattr(problem, "parameter", None)
    return InvalidRequest(f"vLLM refused the request: {reason}", field=field)
