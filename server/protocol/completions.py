"""Bodies of ``/v1/completions``: raw text or token ids in, text out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, Field

from reft_core.errors import InvalidRequest, UnsupportedFeature
from server.choice import TokenText
from server.protocol.common import FinishReason, ReftReport, SamplingFields, Usage
from server.settings import Settings

Prompt = str | list[str] | list[int] | list[list[int]]


def _check_prompt(value: Any) -> Any:
    """Refuse other shapes than those of :data:`Prompt`, with one message for all."""
    if isinstance(value, str) or (
        isinstance(value, list)
        and value
        and (_all(value, str) or _all_tokens(value) or all(_all_tokens(item) for item in value))
    ):
        return value
    raise ValueError("a string, token ids, or a non-empty list of either")


def _all(items: list[Any], kind: type) -> bool:
    return all(isinstance(item, kind) for item in items)


def _all_tokens(value: Any) -> bool:
    """Whether ``value`` is a list of integers; Python's booleans do not count."""
    return isinstance(value, list) and all(type(item) is int for item in value)


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``."""

    UNSUPPORTED: ClassVar[tuple[str, ...]] = ("suffix",)

    prompt: Annotated[Prompt, BeforeValidator(_check_prompt)]
    max_tokens: int | None = 16
    logprobs: int | None = Field(None, description="the chosen token's and that many likeliest")
    echo: bool | None = Field(False, description="begin the text with the prompt")
    best_of: int | None = None
    suffix: str | None = Field(None, description="not supported")

    def check(self, settings: Settings) -> None:
        """Raise :class:`InvalidRequest` for what the types alone do not rule out."""
        super().check(settings)
        if self.best_of is not None and self.best_of != self.num_choices:
            raise UnsupportedFeature.because("best_of", self.best_of, "it left out, or equal to n")
        if self.echo and self.logprobs is not None:
            raise UnsupportedFeature.because(
                "echo",
                True,
                "false together with logprobs; prompt log-probabilities are not supported here",
            )
        if len(self.prompts) > settings.max_prompts:
            raise InvalidRequest.because(
                "prompt", f"{len(self.prompts)} prompts", f"at most {settings.max_prompts}"
            )

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class CompletionLogprobs(BaseModel):
    """Parallel lists, an entry a token. Offsets count characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: list[TokenText]) -> CompletionLogprobs:
        """The lists for some tokens."""
        return cls(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                {other.text: other.logprob for other in (token, *token.top)} for token in tokens
            ],
            text_offset=[token.text_offset for token in tokens],
        )


class CompletionChoice(BaseModel):
    """One answer, or in a stream the next part of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionResponse(BaseModel):
    """Answer of ``/v1/completions``, also in parts; parts differ in what they leave out."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    reft: ReftReport | None = None
