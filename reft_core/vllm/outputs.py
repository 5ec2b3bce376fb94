"""What vLLM says of a request, as our outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput

from reft_core.engine.interface import FinishReason, Output, Request, Token, TokenLogprob
from reft_core.engine.sampler import NOT_FINITE
from reft_core.errors import RequestFailed
from reft_core.vllm.sampling import only_reads


def to_outputs(request: Request, delta: RequestOutput, *, is_first: bool) -> Iterator[Output]:
    """One output a token of what is new of a request; the last has a reason if it has ended.

    Raises :class:`RequestFailed` if vLLM could not go on with it.
    """
    new = delta.outputs[0]
    if new.finish_reason not in (None, "stop", "length"):
        raise RequestFailed(f"vLLM ended the request with reason {new.finish_reason!r}")
    if delta.metrics is not None and delta.metrics.is_corrupted:
        raise RequestFailed(NOT_FINITE)
    cached = delta.num_cached_tokens or 0
    if only_reads(request):
        yield from _read(request, delta, cached)
        return
    scores = _prompt_scores(request, delta) if is_first else ()
    wanted = request.params.logprobs
    for place, token_id in enumerate(new.token_ids):
        token = Token(token_id)
        if wanted is not None:
            token = _token_at(new.logprobs, place, wanted)
        ends = delta.finished and place == len(new.token_ids) - 1
        yield Output(
            request.request_id,
            token,
            _reason(new.finish_reason) if ends else None,
            num_cached_tokens=cached,
            prompt_logprobs=scores if place == 0 else (),
        )


def _reason(vllm_reason: str | None) -> FinishReason:
    """Ours for one of vLLM's."""
    return "stop" if vllm_reason == "stop" else "length"


def _read(request: Request, delta: RequestOutput, cached: int) -> Iterator[Output]:
    """The outputs of a request for which no token was to be chosen."""
    if not delta.finished:
        return
    scores = _prompt_scores(request, delta)
    if not request.completion:
        yield Output(
            request.request_id, None, "length", num_cached_tokens=cached, prompt_logprobs=scores
        )
        return
    num_prompt = len(request.prompt)
    for place, token_id in enumerate(request.completion):
        token = _token_at(delta.prompt_logprobs, num_prompt + place, request.params.logprobs or 0)
        assert token.token_id == token_id
        yield Output(
            request.request_id,
            Token(token_id, token.logprob, token.top_logprobs),
            "length" if place == len(request.completion) - 1 else None,
            num_cached_tokens=cached,
            prompt_logprobs=scores if place == 0 else (),
        )


def _prompt_scores(request: Request, delta: RequestOutput) -> tuple[Token | None, ...]:
    """The prompt's tokens with their log-probabilities, if they were asked for."""
    wanted, found = request.params.prompt_logprobs, delta.prompt_logprobs
    if wanted is None:
        return ()
    places = range(1, len(request.prompt))
    return (None, *(_token_at(found, place, wanted, ranked=True) for place in places))


def _token_at(
    flat: FlatLogprobs | Sequence[object] | None, place: int, wanted: int, *, ranked: bool = False
) -> Token:
    """The token at a place, with ``wanted`` of the likeliest there. vLLM puts it first."""
    assert isinstance(flat, FlatLogprobs), "asked for in the sampling parameters"
    start, end = flat.start_indices[place], flat.end_indices[place]
    pairs = zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True)
    token_id, logprob = next(pairs)
    return Token(
        token_id,
        logprob,
        tuple(TokenLogprob(other, value) for other, value in islice(pairs, wanted)),
        flat.ranks[start] if ranked else None,
    )
