"""Bodies of ``/v1/classify``: texts in, a label and its probability out."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints

from reft_core.errors import InvalidRequest
from server.generation import FinishedChoice
from server.protocol.common import AdapterRequest, ReftReport, Usage
from server.settings import Settings

MAX_LABELS = 256
_Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _as_texts(value: Any) -> Any:
    """One text as a list of it; other types are refused with one clear message."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("a string or a non-empty list of strings")


class ClassifyRequest(AdapterRequest):
    """Body of ``POST /v1/classify``."""

    input: Annotated[
        list[str], BeforeValidator(_as_texts, json_schema_input_type=str | list[str])
    ] = Field(description="each text becomes one user message in the adapter's template")
    labels: list[_Label] | None = Field(
        None, min_length=2, max_length=MAX_LABELS, description="default: the adapter's own"
    )

    def check(self, settings: Settings) -> None:
        """Raise :class:`InvalidRequest` for what the types alone do not rule out."""
        if len(self.input) > settings.max_prompts:
            raise InvalidRequest.because(
                "input", f"{len(self.input)} texts", f"at most {settings.max_prompts}"
            )
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise InvalidRequest.because("labels", self.labels, "each label once")

    def choose_labels(self, own: tuple[str, ...] | None) -> list[str]:
        """The labels to choose from, ``own`` being the adapter's."""
        labels = self.labels or list(own or ())
        if not labels:
            raise InvalidRequest.because(
                "labels", None, f"2 to {MAX_LABELS} labels, since {self.model!r} brings none"
            )
        if len(labels) > MAX_LABELS:
            raise InvalidRequest.because(
                "labels", f"{len(labels)} of the adapter", f"at most {MAX_LABELS}"
            )
        return labels


class LabelProbability(BaseModel):
    """One label and how likely it is among the labels."""

    label: str
    prob: float
    logprob: float = Field(description="natural log of the label's probability as an answer")


class ClassifiedText(BaseModel):
    """The likeliest label of one input."""

    index: int
    label: str
    probs: list[float] = Field(description="of every label, in their order; they sum to 1")
    num_classes: int
    labels: list[LabelProbability]

    @classmethod
    def of(cls, index: int, labels: list[str], choices: list[FinishedChoice]) -> Self:
        """From the scored completions, one a label.

        A label's log-probability is that of its tokens and of the end of the answer.
        """
        logprobs = [math.fsum(token.logprob for token in choice.tokens) for choice in choices]
        top = max(logprobs)
        weights = [math.exp(logprob - top) for logprob in logprobs]
        probs = [weight / math.fsum(weights) for weight in weights]
        return cls(
            index=index,
            label=labels[probs.index(max(probs))],
            probs=probs,
            num_classes=len(labels),
            labels=[
                LabelProbability(label=label, prob=prob, logprob=logprob)
                for label, prob, logprob in zip(labels, probs, logprobs, strict=True)
            ],
        )


class ClassifyResponse(BaseModel):
    """Answer of ``/v1/classify``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifiedText]
    usage: Usage
    reft: ReftReport
