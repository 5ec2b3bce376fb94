"""One of our requests as vLLM's sampling parameters."""

from __future__ import annotations

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from reft_core.engine.interface import Request
from reft_core.vllm.request import to_extra_args

_SEED_MASK = 2**64 - 1


def only_reads(request: Request) -> bool:
    """Whether no token is to be chosen: the prompt is read, with a given completion or none.

    vLLM chooses at least one all the same, which nobody is shown.
    """
    return bool(request.completion) or request.params.max_tokens == 0


def prompt_of(request: Request) -> list[int]:
    """What vLLM is given as the prompt. A given completion is part of it, so that the
    log-probabilities of all its tokens come from one forward."""
    return [*request.prompt, *request.completion]


def to_vllm(request: Request, stop_ids: frozenset[int]) -> SamplingParams:
    """vLLM's form of ``request``, which ends with one of ``stop_ids``.

    What differs from :class:`interface.SamplingParams`: vLLM takes a temperature below 0.01 for
    0.01, and applies min-p before top-k and top-p, which matters only with top-p beside it.
    """
    params = request.params
    scored = only_reads(request)
    return SamplingParams(
        max_tokens=1 if scored else params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias) or None,
        # Two's complement: -1, which is a seed like any other, means none to vLLM.
        seed=None if params.seed is None else params.seed & _SEED_MASK,
        # Ours alone end an answer, whatever vLLM finds in the model's folder.
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,
        logprobs=None if scored else params.logprobs,
        prompt_logprobs=_num_prompt_logprobs(request),
        flat_logprobs=True,
        detokenize=False,
        structured_outputs=_form(request),
        output_kind=RequestOutputKind.DELTA,
        extra_args=to_extra_args(request) or None,
        skip_clone=True,
    )


def _form(request: Request) -> StructuredOutputsParams | None:
    """What the answer must look like, for the backend of vLLM that has our grammars' library."""
    constraint = request.constraint
    return None if constraint is None else StructuredOutputsParams(grammar=constraint.lark)


def _num_prompt_logprobs(request: Request) -> int | None:
    """How many of the likeliest tokens are wanted, at most, in the place of each read one."""
    params = request.params
    if not request.completion:
        return params.prompt_logprobs
    return max(params.logprobs or 0, params.prompt_logprobs or 0)
