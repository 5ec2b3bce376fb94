"""Log-probabilities of a prompt's tokens, as vLLM's API answers them."""

from __future__ import annotations

from pydantic import BaseModel, Field

from server.answering.choice import TokenText


class PromptLogprob(BaseModel):
    """A token in a place of the prompt."""

    logprob: float
    rank: int = Field(description="among all tokens in this place, from 1")
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""For each token of a prompt, the token itself and the likeliest in its place, by id."""


def prompt_logprobs_of(tokens: list[TokenText], num_top: int) -> PromptLogprobs:
    """vLLM's form of a prompt's log-probabilities, given all its tokens but the first."""
    found: PromptLogprobs = [None]
    for token in tokens:
        entries = {
            token.token_id: PromptLogprob(
                logprob=token.logprob, rank=token.rank or 1, decoded_token=token.text
            )
        }
        for rank, other in enumerate(token.top[:num_top], start=1):
            entries.setdefault(
                other.token_id,
                PromptLogprob(logprob=other.logprob, rank=rank, decoded_token=other.text),
            )
        found.append(entries)
    return found
