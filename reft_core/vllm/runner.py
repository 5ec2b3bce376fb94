"""What the plugin adds to vLLM's model runner: the plan of each step, while its forward runs."""

from __future__ import annotations

from functools import wraps
from typing import Any

from reft_core.vllm.plan import chunks_of
from reft_core.vllm.worker import armed


def with_plan(model_forward: Any) -> Any:
    """``GPUModelRunner._model_forward`` under the plan of its step."""

    @wraps(model_forward)
    def forward(runner: Any, *args: Any, **kwargs: Any) -> Any:
        chunks = chunks_of(runner)
        if not chunks:
            return model_forward(runner, *args, **kwargs)
        step = armed(runner).begin(chunks)
        try:
            return model_forward(runner, *args, **kwargs)
        finally:
            armed(runner).end(chunks, step)

    return forward


def forgetting(update_states: Any) -> Any:
    """``GPUModelRunner._update_states`` that forgets finished requests here too."""

    @wraps(update_states)
    def update(runner: Any, scheduler_output: Any) -> Any:
        armed(runner).planner.forget(scheduler_output.finished_req_ids)
        return update_states(runner, scheduler_output)

    return update


def naming_failures(sample_tokens: Any) -> Any:
    """A runner's ``sample_tokens`` whose output names the requests that must fail."""

    @wraps(sample_tokens)
    def sample(runner: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(runner, *args, **kwargs)
        armed(runner).name_failures(output)
        return output

    return sample


def never_full_graph_of_edits(determine: Any) -> Any:
    """``GPUModelRunner._determine_batch_execution_and_padding`` for prefills of one token.

    Such a step looks like a decode step, whose whole graph has no edits in it. Untested: it
    matters on CUDA only.
    """

    @wraps(determine)
    def decide(runner: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("force_uniform_decode") is None and chunks_of(runner):
            kwargs["force_uniform_decode"] = False
        return determine(runner, *args, **kwargs)

    return decide
