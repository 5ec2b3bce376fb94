"""The same for vLLM's second model runner, which needs a GPU. Untested, and off until it is tested:
see ``allow_unproved`` in :mod:`reft_core.vllm.settings`.

That runner keeps no sampling parameters, so they are noted when a request comes. It decides on the
graph of a step right after gathering the batch, and that is where the plan is made.
"""

from __future__ import annotations

from functools import wraps
from itertools import accumulate
from typing import Any

from reft_core.vllm.admitted import admitted_prompt_len, admitted_uses
from reft_core.vllm.apply import Step, end_step
from reft_core.vllm.plan import Chunk
from reft_core.vllm.worker import armed

_OPEN = "_reft_open"
"""Attribute of a runner with the chunks and the :class:`Step` of its running forward."""


def noting_requests(add_requests: Any) -> Any:
    """``GPUModelRunner.add_requests`` that notes who has adapters, also after a preemption."""

    @wraps(add_requests)
    def add(runner: Any, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            if params is not None and admitted_uses(params.extra_args):
                prompt_len = admitted_prompt_len(params.extra_args)
                armed(runner).requests[new.req_id] = params, prompt_len
        add_requests(runner, scheduler_output)

    return add


def forgetting(finish_requests: Any) -> Any:
    """``GPUModelRunner.finish_requests`` that forgets finished requests here too."""

    @wraps(finish_requests)
    def finish(runner: Any, scheduler_output: Any) -> None:
        ours = armed(runner)
        ours.planner.forget(scheduler_output.finished_req_ids)
        for request_id in scheduler_output.finished_req_ids:
            ours.requests.pop(request_id, None)
        finish_requests(runner, scheduler_output)

    return finish


def beginning_a_step(gather: Any) -> Any:
    """``GPUModelRunner.gather_batch_req_state`` that has the layers apply the step's plan.

    A step with edits is not a uniform decode, whatever its lengths: no whole graph may replay it.
    """

    @wraps(gather)
    def gather_and_begin(runner: Any, scheduler_output: Any, dummy_run: bool) -> Any:
        state, uniform_count = gather(runner, scheduler_output, dummy_run)
        chunks = [] if state is None else _chunks_of(runner, state)
        if not chunks:
            return state, uniform_count
        setattr(runner, _OPEN, (chunks, armed(runner).begin(chunks)))
        return state._replace(decode_graph_eligible=False), None

    return gather_and_begin


def ending_the_step(execute_model: Any) -> Any:
    """``GPUModelRunner.execute_model`` after which the layers apply nothing."""

    @wraps(execute_model)
    def execute(runner: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            output = execute_model(runner, *args, **kwargs)
        except BaseException:
            end_step()
            raise
        opened: tuple[list[Chunk], Step] | None = getattr(runner, _OPEN, None)
        if opened is not None:
            setattr(runner, _OPEN, None)
            armed(runner).end(*opened)
        return output

    return execute


def _chunks_of(runner: Any, state: Any) -> list[Chunk]:
    """The chunks of a gathered batch that may be edited."""
    requests = armed(runner).requests
    lengths = [int(length) for length in state.num_scheduled_tokens]
    computed = runner.req_states.num_computed_tokens_np[state.idx_mapping_np]
    chunks = []
    for request_id, row, length, num_computed in zip(
        state.req_ids, accumulate(lengths, initial=0), lengths, computed, strict=False
    ):
        if request_id in requests:
            params, prompt_len = requests[request_id]
            chunk = Chunk(request_id, params, prompt_len, int(num_computed), row, length)
            if chunk.may_be_edited:
                chunks.append(chunk)
    return chunks
