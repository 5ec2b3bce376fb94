"""What the plugin adds to vLLM's scheduler: requests that a worker had to give up end in error."""

from __future__ import annotations

from functools import wraps
from typing import Any


def failing_requests(update_from_output: Any) -> Any:
    """``Scheduler.update_from_output`` that ends the requests a worker named, and only those.

    Their blocks leave the prefix cache, since what they hold is not what their names say.
    """

    @wraps(update_from_output)
    def update(scheduler: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        failed = getattr(model_runner_output, "reft_failed", ())
        for request_id in failed:
            if request_id in scheduler.requests:
                blocks = scheduler.kv_cache_manager.get_block_ids(request_id)
                scheduler.kv_cache_manager.evict_blocks({b for group in blocks for b in group})
                # The scheduler's own list of requests to end with an error after this step.
                scheduler.grammar_compile_error_reqs.add(request_id)
        outputs = update_from_output(scheduler, scheduler_output, model_runner_output)
        if failed:
            _fail(outputs, frozenset(failed))
        return outputs

    return update


def _fail(outputs: Any, failed: frozenset[str]) -> None:
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
