"""What the plugin adds to vLLM's scheduler: requests that a worker had to give up end in error."""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

from reft_core.vllm.admitted import admitted_runs


def failing_requests(update_from_output: Any) -> Any:
    """``Scheduler.update_from_output`` that ends the requests a worker named, and only those and
    the ones that may have read what those wrote.

    Their blocks leave the prefix cache, since what they hold is not what their names say.
    """

    @wraps(update_from_output)
    def update(scheduler: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        failed = _with_readers(scheduler, getattr(model_runner_output, "reft_failed", ()))
        for request_id in failed:
            if request_id in scheduler.requests:
                blocks = scheduler.kv_cache_manager.get_block_ids(request_id)
                scheduler.kv_cache_manager.evict_blocks({b for group in blocks for b in group})
                # The scheduler's own list of requests to end with an error after this step.
                scheduler.grammar_compile_error_reqs.add(request_id)
        outputs = update_from_output(scheduler, scheduler_output, model_runner_output)
        if failed:
            _fail(outputs, failed)
        return outputs

    return update


def _with_readers(scheduler: Any, named: Iterable[str]) -> set[str]:
    """Requests that failed, and all that run with the same edits on the same tokens.

    A block is in the prefix cache from the moment its step is scheduled: another request of that
    step may already have read it, and would not fail by itself.
    """
    failed = set(named)
    for request in [scheduler.requests[name] for name in named if name in scheduler.requests]:
        starts = [start for start, _, _ in admitted_runs(request.sampling_params.extra_args)]
        first = min(starts, default=request.num_tokens) // scheduler.hash_block_size
        if first < len(request.block_hashes):  # else no whole block holds what its edits change
            edited = request.block_hashes[first]
            failed.update(
                other.request_id
                for other in scheduler.running
                if edited in other.block_hashes[first : first + 1]
            )
    return failed


def _fail(outputs: Any, failed: set[str]) -> None:
    """Take back what a step answered to requests that failed in it.

    The scheduler takes in a step's tokens before its errors: a request whose last token this was
    has ended by then, as if nothing were wrong.
    """
    from vllm.v1.engine import FinishReason

    for of_client in outputs.values():
        for output in of_client.outputs:
            if output.request_id in failed:
                output.finish_reason, output.stop_reason = FinishReason.ERROR, None
                output.new_token_ids = []
                output.new_logprobs = output.new_prompt_logprobs_tensors = None
