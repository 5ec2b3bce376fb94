"""What is refused at an engine's door, in the same words whichever engine it is."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import replace

from reft_core.engine.interface import Request, SamplingParams
from reft_core.errors import AdapterMismatch, InvalidRequest, PromptTooLong, explain
from reft_core.spec import AdapterSpec


def check_not_empty(field: str, tokens: Sized) -> None:
    """Raise :class:`InvalidRequest` if there are no tokens."""
    if not len(tokens):
        raise InvalidRequest.because(field, tokens, "at least one token")


def check_known(field: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Raise :class:`InvalidRequest` unless every token is in the vocabulary."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InvalidRequest.because(field, token, f"token ids 0 to {vocab_size - 1}")


def check_length(field: str, num_tokens: int, most: int) -> None:
    """Raise :class:`PromptTooLong` for more than ``most`` tokens."""
    if num_tokens > most:
        raise PromptTooLong(explain(field, f"{num_tokens} tokens", f"at most {most}"), field=field)


def check_fits_context(num_prompt: int, max_tokens: int, num_virtual: int, most: int) -> None:
    """Raise :class:`PromptTooLong` unless a prompt, its answer and the virtual tokens before it fit
    into a context of ``most`` tokens.
    """
    wanted = num_virtual + num_prompt + max_tokens
    if wanted > most:
        prefix = f", {num_virtual} of the adapter's prefix" * bool(num_virtual)
        allowed = (
            f"at most {most} tokens together ({num_prompt} of prompt and max_tokens {max_tokens}"
            f"{prefix} make {wanted})"
        )
        raise PromptTooLong(explain("prompt", wanted, allowed), field="prompt")


def check_tokens(request: Request, vocab_size: int) -> None:
    """Refuse a request whose numbers do not fit the model."""
    check_not_empty("prompt", request.prompt)
    params = request.params
    groups = {
        "prompt": request.prompt,
        "completion": request.completion,
        "source": [token for choice in request.adapters for token in choice.source],
        "logit_bias": params.logit_bias,
        "stop_token_ids": params.stop_token_ids,
    }
    for field, tokens in groups.items():
        check_known(field, tokens, vocab_size)


def check_generates(spec: AdapterSpec) -> None:
    """Raise :class:`AdapterMismatch` for an adapter with a head, which no causal model takes."""
    if spec.head is not None:
        raise AdapterMismatch(
            explain("task.kind", spec.task.kind, "'generation' on a causal model"),
            field="task.kind",
        )


def as_scored(request: Request) -> Request:
    """A request whose completion is given, with the parameters that follow from that."""
    if not request.completion:
        return request
    params = SamplingParams(
        max_tokens=len(request.completion),
        temperature=0,
        logprobs=request.params.logprobs or 0,
        prompt_logprobs=request.params.prompt_logprobs,
    )
    return replace(request, params=params)
