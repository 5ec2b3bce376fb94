"""Bodies of ``/v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from reft_core.errors import InvalidRequest, UnsupportedFeature
from server.answering.choice import LikelyToken, TokenText
from server.protocol.common import FinishReason, SamplingFields
from server.protocol.options import RequestBody
from server.protocol.prompt_logprobs import PromptLogprobs
from server.protocol.reports import ChoiceReport, FanOutReport, ReftReport, Usage
from server.settings import Settings


class TextPart(RequestBody):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _check_content(value: Any) -> Any:
    """Content as one string. Parts other than text are a feature this server lacks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError('a string or a list of {"type": "text", "text": ...} parts')
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedFeature.because("messages.content.type", kind, "'text' parts only")
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError('parts of the form {"type": "text", "text": "..."}')
        texts.append(part["text"])
    return "".join(texts)


class ChatMessage(RequestBody):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is another word for system"
    )
    content: Annotated[
        str, BeforeValidator(_check_content, json_schema_input_type=str | list[TextPart])
    ]
    name: str | None = Field(None, description="accepted, without effect")
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, description="accepted, without effect")
    parsed: Any = Field(
        None, description="accepted, without effect: what OpenAI's client made of the content"
    )


class ChatRequest(SamplingFields):
    """Body of ``POST /v1/chat/completions``."""

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        "tools",
        "functions",
        "function_call",
        "audio",
        "prediction",
        "moderation",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    )
    ONLY: ClassVar[dict[str, Any]] = {"modalities": ["text"], "tool_choice": "none"}

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, description="default: up to the end of the context")
    max_completion_tokens: int | None = Field(None, description="newer name of max_tokens")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, description="likeliest tokens to report; needs logprobs")
    modalities: list[str] | None = Field(None, description='["text"] only')
    tool_choice: str | dict[str, Any] | None = Field(None, description='"none" only')
    parallel_tool_calls: bool | None = Field(None, description="accepted, without effect")

    tools: list[Any] | None = Field(None, description="not supported")
    functions: list[Any] | None = Field(None, description="not supported")
    function_call: Any = Field(None, description="not supported")
    audio: Any = Field(None, description="not supported")
    prediction: Any = Field(None, description="not supported")
    moderation: Any = Field(None, description="not supported")
    reasoning_effort: Any = Field(None, description="not supported")
    verbosity: Any = Field(None, description="not supported")
    web_search_options: Any = Field(None, description="not supported")

    def check(self, settings: Settings) -> None:
        """Raise :class:`InvalidRequest` for what the types alone do not rule out."""
        super().check(settings)
        for field in ("max_tokens", "max_completion_tokens"):
            self._check_at_most(field, getattr(self, field), settings.max_answer_tokens)
        self._check_at_most("top_logprobs", self.top_logprobs, settings.max_logprobs)
        if self.prompt_logprobs is not None and self.reft.models is not None:
            raise InvalidRequest.because(
                "prompt_logprobs", self.prompt_logprobs, "null beside reft.models"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest.because(
                "top_logprobs", self.top_logprobs, "null unless logprobs is true"
            )
        if self.token_limit == 0 and self.prompt_logprobs is None:
            field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise InvalidRequest.because(field, 0, "at least 1, or 0 with prompt_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise InvalidRequest.because(
                "max_tokens", self.max_tokens, "null beside max_completion_tokens"
            )

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages in the roles that templates know."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content,
            }
            for message in self.messages
        ]

    @property
    def token_limit(self) -> int | None:
        """Most tokens of an answer, if the caller set a limit."""
        limit = self.max_completion_tokens
        return self.max_tokens if limit is None else limit


class LogprobEntry(BaseModel):
    """One token with its bytes, for tokens that are no text by themselves."""

    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token: LikelyToken) -> LogprobEntry:
        """The entry of one token."""
        return cls(token=token.text, logprob=token.logprob, bytes=list(token.data))


class ChatLogprob(LogprobEntry):
    """A generated token, with the likeliest in its place."""

    top_logprobs: list[LogprobEntry]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatLogprob]
    refusal: None = None

    @classmethod
    def of(cls, tokens: Iterable[TokenText]) -> ChatLogprobs:
        """The entries of some tokens."""
        return cls(
            content=[
                ChatLogprob(
                    **LogprobEntry.of(token).model_dump(),
                    top_logprobs=[LogprobEntry.of(other) for other in token.top],
                )
                for token in tokens
            ]
        )


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    reft: ChoiceReport = None


class ChatResponse(BaseModel):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    reft: ReftReport | FanOutReport


class ScoredChatResponse(ChatResponse):
    """Answer of ``/v1/chat/completions``, with what ``prompt_logprobs`` asked for."""

    prompt_logprobs: PromptLogprobs


class MessageDelta(BaseModel):
    """The next part of an assistant's message."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The next part of one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    reft: ChoiceReport = None


class ChatChunk(BaseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    reft: ReftReport | FanOutReport | None = None
