"""What is refused at an engine's door, in the same words whichever engine it is."""

from __future__ import annotations

from collections.abc import Iterable, Sized

from reft_core.errors import InvalidRequest, PromptTooLong, explain


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
