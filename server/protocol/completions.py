"""Bodies of ``/v1/completions``: raw text or token ids in, text out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, Field

from reft_core.errors import InvalidRequest, UnsupportedFeature
from server.answering.choice import TokenText
from server.answering.echo import ScoredPrompt
from server.protocol.common import FinishReason, SamplingFields
from server.protocol.prompt_logprobs import PromptLogprobs
from server.protocol.reports import ChoiceReport, FanOutReport, ReftReport, Usage
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
    max_tokens: int | None = Field(
        None, description="default: 16, or the server's limit where that is less"
    )
    logprobs: int | None = Field(None, description="the chosen token's and that many likeliest")
    echo: bool | None = Field(False, description="begin the text with the prompt")
    best_of: int | None = None
    suffix: str | None = Field(None, description="not supported")

    def check(self, settings: Settings) -> None:
        """Raise :class:`InvalidRequest` for what the types alone do not rule out."""
        if self.num_prompts > settings.max_prompts:
            raise InvalidRequest.because(
                "prompt", f"{self.num_prompts} prompts", f"at most {settings.max_prompts}"
            )
        super().check(settings)
        self._check_at_most("max_tokens", self.max_tokens, settings.max_answer_tokens)
        self._check_at_most("logprobs", self.logprobs, settings.max_logprobs)
        if self.best_of is not None and self.best_of != self.num_choices:
            raise UnsupportedFeature.because("best_of", self.best_of, "it left out, or equal to n")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            allowed = "at least 1, or 0 with echo or prompt_logprobs"
            raise InvalidRequest.because("max_tokens", self.max_tokens, allowed)

    @property
    def scored_prompt(self) -> int | None:
        """How many likeliest tokens to report in each place of the prompt; None for no scores."""
        echoed = self.logprobs if self.echo else None
        wanted = [number for number in (echoed, self.prompt_logprobs) if number is not None]
        return max(wanted, default=None)

    @property
    def num_prompts(self) -> int:
        """Prompts that each model answers."""
        return len(self.prompts)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class CompletionLogprobs(BaseModel):
    """Parallel lists, an entry a token. Offsets count characters of the choice's text.

    The first token of an echoed prompt has no probability, and null for it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def of(
        cls, tokens: list[TokenText], num_top: int, *, shift: int = 0, echo: ScoredPrompt | None
    ) -> CompletionLogprobs:
        """The lists for some tokens of an answer, and for the prompt that it begins with.

        ``shift`` is the length of the echoed text.
        """
        lists = cls(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if echo is not None:
            lists._append(echo.first, None, None, 0)
            for token in echo.tokens:
                lists._append(token.text, token.logprob, _top(token, num_top), token.text_offset)
        for token in tokens:
            lists._append(
                token.text, token.logprob, _top(token, num_top), shift + token.text_offset
            )
        return lists

    def _append(
        self, text: str, logprob: float | None, top: dict[str, float] | None, offset: int
    ) -> None:
        self.tokens.append(text)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(offset)


def _top(token: TokenText, num_top: int) -> dict[str, float]:
    """The likeliest tokens and the chosen one; of those with the same text, the likeliest."""
    found: dict[str, float] = {}
    for other in (*token.top[:num_top], token):
        found.setdefault(other.text, other.logprob)
    return found


class CompletionChoice(BaseModel):
    """One answer, or in a stream the next part of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    reft: ChoiceReport = None


class ScoredCompletionChoice(CompletionChoice):
    """One answer, with what ``prompt_logprobs`` asked for."""

    prompt_logprobs: PromptLogprobs


class CompletionResponse(BaseModel):
    """Answer of ``/v1/completions``, also in parts; parts differ in what they leave out."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ScoredCompletionChoice | CompletionChoice]
    usage: Usage | None = None
    reft: ReftReport | FanOutReport | None = None
