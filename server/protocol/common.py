"""Parts that requests and responses of both text APIs share."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from reft_core.engine.interface import SamplingParams
from reft_core.errors import InvalidRequest, UnsupportedFeature
from reft_core.grammar import GrammarSpec
from server.answering.named import Answering
from server.protocol.options import FanOutOptions, ReftOptions, RequestBody
from server.protocol.structured import ResponseFormat, StructuredOutputs, grammar_of
from server.settings import Settings

FinishReason = Literal["stop", "length"]


class StreamOptions(RequestBody):
    """How a stream is sent."""

    include_usage: bool = Field(False, description="send a last chunk with the token counts")
    include_obfuscation: bool | None = Field(None, description="accepted, without effect")


def _as_list(value: Any) -> Any:
    """A lone stop string as a list; other types are refused here, with one clear message."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("a string or a list of strings")


def _as_token_biases(value: Any) -> Any:
    """A logit-bias object; JSON can only spell its token ids as strings."""
    if value is None:
        return {}
    if isinstance(value, dict) and all(re.fullmatch(r"\d{1,9}", str(key)) for key in value):
        return value
    raise ValueError("an object from token ids to numbers")


StopStrings = Annotated[
    list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None)
]
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_as_token_biases, json_schema_input_type=dict[str, float] | None),
]


class AdapterRequest(RequestBody):
    """A body that says which adapters answer, and how they act."""

    model: str = Field(
        max_length=256,
        description="base model or adapter: name, name@version or name@sha256:<hex digits>",
    )
    reft: ReftOptions = Field(default=ReftOptions(), description="extension")


class SamplingFields(AdapterRequest):
    """What both APIs let a caller say about sampling, and about the request as a whole."""

    UNSUPPORTED: ClassVar[tuple[str, ...]] = ()
    """Fields known to OpenAI's API that have no meaning here, refused when used."""
    ONLY: ClassVar[dict[str, Any]] = {}
    """Fields that have one value here, and what it is."""

    reft: FanOutOptions = Field(default=FanOutOptions(), description="extension")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, description="choices a prompt and model")
    temperature: float | None = Field(1.0, description="0 is greedy")
    top_p: float | None = 1.0
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: LogitBias = Field(default={})
    seed: int | None = Field(None, description="choice i samples with seed + i")
    stop: StopStrings = Field(default=[])
    response_format: ResponseFormat | None = Field(
        None, description="text, or JSON that follows a schema"
    )

    top_k: int | None = Field(None, ge=-1, description="extension; 0 or -1 keeps all tokens")
    min_p: float | None = Field(None, description="extension")
    repetition_penalty: float | None = Field(None, description="extension")
    stop_token_ids: list[int] = Field(default=[], max_length=128, description="extension")
    priority: int = Field(
        0, description="extension; among the tenant's own requests, lower is more urgent"
    )
    ignore_eos: bool = Field(False, description="extension; generate up to max_tokens")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="extension; the form that answers have"
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="older name of the above")
    guided_regex: str | None = Field(None, description="older name of the above")
    guided_choice: list[str] | None = Field(None, description="older name of the above")
    guided_grammar: str | None = Field(None, description="older name of the above")
    prompt_logprobs: int | None = Field(
        None,
        description="extension; log-probabilities of the prompt's tokens, with that many "
        "likeliest in the place of each; not in a stream",
    )

    user: str | None = Field(None, description="accepted, without effect")
    metadata: dict[str, Any] | None = Field(None, description="accepted, without effect")
    store: bool | None = Field(None, description="accepted; nothing is stored")
    service_tier: str | None = Field(None, description="accepted, without effect")
    safety_identifier: str | None = Field(None, description="accepted, without effect")
    prompt_cache_key: str | None = Field(None, description="accepted, without effect")
    prompt_cache_options: dict[str, Any] | None = Field(
        None, description="accepted, without effect: prompts are cached by themselves"
    )
    prompt_cache_retention: str | None = Field(None, description="accepted, without effect")

    def check(self, settings: Settings) -> None:
        """Raise :class:`InvalidRequest` for what the types alone do not rule out."""
        for name in self.UNSUPPORTED:
            if (value := getattr(self, name)) not in (None, [], {}):
                raise UnsupportedFeature.because(name, value, "it left out; not supported here")
        for name, only in self.ONLY.items():
            if (value := getattr(self, name)) not in (None, only):
                raise UnsupportedFeature.because(name, value, f"{only!r} or nothing")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest.because(
                "stream_options", self.stream_options.model_dump(), "null unless stream is true"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest.because(
                "prompt_logprobs", self.prompt_logprobs, "null when stream is true"
            )
        if self.reft.models is not None and len(self.reft.models) > settings.max_fan_out:
            raise InvalidRequest.because(
                "reft.models", f"{len(self.reft.models)} models", f"at most {settings.max_fan_out}"
            )
        if self.num_choices > settings.max_n:
            raise InvalidRequest.because("n", self.n, f"at most {settings.max_n}")
        self._check_product(settings.max_open)
        self._check_at_most("prompt_logprobs", self.prompt_logprobs, settings.max_logprobs)
        if len(self.stop) > settings.max_stop:
            raise InvalidRequest.because(
                "stop", f"{len(self.stop)} strings", f"at most {settings.max_stop}"
            )
        for stop in self.stop:
            if not 1 <= len(stop) <= settings.max_stop_chars:
                allowed = f"strings of 1 to {settings.max_stop_chars} characters"
                raise InvalidRequest.because("stop", stop, allowed)

    @staticmethod
    def _check_at_most(field: str, value: int | None, most: int | None) -> None:
        """Refuse a value above the server's limit, if both are set."""
        if value is not None and most is not None and value > most:
            raise InvalidRequest.because(field, value, f"at most {most}")

    def _check_product(self, most: int) -> None:
        """Refuse more answers than the engine can ever take in, which no waiting would help."""
        num_models = 1 if self.reft.models is None else len(self.reft.models)
        counts = {"prompt": self.num_prompts, "reft.models": num_models, "n": self.num_choices}
        if (total := math.prod(counts.values())) > most:
            shown = f"{self.num_prompts} prompts x {num_models} models x {self.num_choices}"
            raise InvalidRequest.because(
                max(counts, key=lambda field: counts[field]),
                f"{shown} choices = {total}",
                f"at most {most} answers in all, as many as the engine takes in at once",
            )

    @property
    def answering(self) -> Answering:
        """The models that answer, each with what is stacked on it."""
        return self.reft.answering(self.model)

    @property
    def num_prompts(self) -> int:
        """Prompts that each model answers."""
        return 1

    @property
    def num_choices(self) -> int:
        """Choices that each model gives to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def grammar(self) -> GrammarSpec | None:
        """The grammar that answers must follow, if any. Raises :class:`InvalidRequest`."""
        guided = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        return grammar_of(self.response_format, self.structured_outputs, guided)

    def sampling(
        self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The engine's form of these fields. Raises :class:`InvalidRequest`."""
        # JSON null means the default, whatever the field.
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_default(self.temperature, 1.0),
            top_p=_default(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=_default(self.min_p, 0.0),
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            presence_penalty=_default(self.presence_penalty, 0.0),
            frequency_penalty=_default(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _default(value: float | None, default: float) -> float:
    """``value``, or the default for null."""
    return default if value is None else value


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail
