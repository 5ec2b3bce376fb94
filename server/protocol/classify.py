"""Bodies of ``/v1/classify``: texts in, a label and its probability out, or a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints

from reft_core.classification.interface import Classification
from reft_core.errors import InvalidRequest
from server.answering.named import NamedAdapter, UsedAdapter
from server.protocol.common import AdapterRequest
from server.protocol.reports import ReftReport, Usage
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
    ] = Field(
        description="for a causal model each becomes one user message in the adapter's template"
    )
    text_pair: Annotated[
        list[str] | None,
        BeforeValidator(
            lambda value: None if value is None else _as_texts(value),
            json_schema_input_type=str | list[str] | None,
        ),
    ] = Field(None, description="for an encoder: the second text of each input's pair")
    labels: list[_Label] | None = Field(
        None,
        min_length=2,
        max_length=MAX_LABELS,
        description="default: the adapter's own; one of these may be written with or without the "
        "space that the adapter's answers begin with",
    )

    @property
    def named(self) -> tuple[NamedAdapter, ...]:
        """What ``model`` names and what is stacked on it, with their options."""
        return self.reft.stacked_on(self.reft.named(self.model))

    @property
    def texts(self) -> tuple[tuple[str, str | None], ...]:
        """Each input with the second text of its pair, if there is one."""
        if self.text_pair is None:
            return tuple((text, None) for text in self.input)
        return tuple(zip(self.input, self.text_pair, strict=True))

    def check(self, settings: Settings) -> None:
        """Raise :class:`InvalidRequest` for what the types alone do not rule out."""
        most = min(settings.max_prompts, settings.max_open)
        if len(self.input) > most:
            raise InvalidRequest.because("input", f"{len(self.input)} texts", f"at most {most}")
        if self.text_pair is not None and len(self.text_pair) != len(self.input):
            expected = f"{len(self.input)}, one for each input"
            raise InvalidRequest.because("text_pair", f"{len(self.text_pair)} texts", expected)
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise InvalidRequest.because("labels", self.labels, "each label once")

    def choose_labels(self, max_open: int, versions: Sequence[UsedAdapter]) -> list[str] | None:
        """The labels that a causal model is to score; None for those that an adapter brings.

        Raises :class:`InvalidRequest` if there are too few or too many, also over all texts:
        each label of each text is one of ``max_open`` requests that the engine takes in at once.
        """
        num_labels = len(self.labels or self._labels_of(versions))
        if (total := len(self.input) * num_labels) > max_open:
            raise InvalidRequest.because(
                "input",
                f"{len(self.input)} texts x {num_labels} labels = {total}",
                f"at most {max_open} labels to score in all",
            )
        return self.labels

    def labels_beside_head(self, versions: Sequence[UsedAdapter]) -> list[str] | None:
        """The labels that a trained head is to choose from; None for all of its own.

        Raises :class:`InvalidRequest` unless exactly one of the adapters brings a head.
        """
        num_heads = sum(version.spec.head is not None for version in versions)
        allowed = "an adapter with a trained head, which classifies on an encoder"
        if num_heads > 1:
            raise InvalidRequest.because(
                "reft.stack",
                [each.model for each in self.reft.stack],
                "one head among all adapters",
            )
        if num_heads == 0 and self.reft.inline is not None:
            raise InvalidRequest.because("reft.inline", "one without a head", allowed)
        if num_heads == 0:
            raise InvalidRequest.because("model", self.model, allowed)
        return self.labels

    def _labels_of(self, versions: Sequence[UsedAdapter]) -> list[str]:
        """The labels that the first adapter with any brings."""
        brought = (version.spec.task.labels for version in versions)
        labels = list(next(filter(None, brought), ()))
        if not 2 <= len(labels) <= MAX_LABELS:
            raise InvalidRequest.because(
                "labels",
                f"{len(labels)} of the adapter" if labels else None,
                f"2 to {MAX_LABELS} labels, since {self.model!r} brings "
                + ("too many" if labels else "none"),
            )
        return labels


class LabelProbability(BaseModel):
    """One label and how likely it is among the labels."""

    label: str
    prob: float
    logprob: float = Field(
        description="natural log of the label's probability: that a causal model's answer begins "
        "with it (is it, where one label begins another), or among all labels of a trained head"
    )


class ClassifiedText(BaseModel):
    """The likeliest label of one input, or its number."""

    index: int
    label: str | None = Field(description="null where a head trained on numbers answers")
    value: float | None = Field(description="what such a head says; null where there are labels")
    probs: list[float] = Field(description="of every label, in their order; they sum to 1")
    num_classes: int
    labels: list[LabelProbability]

    @classmethod
    def of(cls, index: int, outcome: Classification) -> Self:
        """From the classifier's outcome for the ``index``-th text."""
        return cls(
            index=index,
            label=outcome.best,
            value=outcome.value,
            probs=list(outcome.probs),
            num_classes=len(outcome.labels),
            labels=[
                LabelProbability(label=label, prob=prob, logprob=logprob)
                for label, prob, logprob in zip(
                    outcome.labels, outcome.probs, outcome.logprobs, strict=True
                )
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
