"""What answers say beside the text: tokens counted, adapters that took part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BaseModel, Field

from server.answering.generation import AnsweringModel, Generation
from server.answering.named import UsedAdapter


class PromptTokensDetails(BaseModel):
    """Where a prompt's tokens came from."""

    cached_tokens: int = Field(description="not computed for this prompt alone, or not again")


class Usage(BaseModel):
    """Token counts. A prompt counts once for each model that answers it, however many choices it
    has; what was computed for several at once counts as cached for all but one."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, generation: Generation) -> Usage:
        """The counts of a generation so far."""
        return cls.counted(
            generation.num_prompt_tokens,
            generation.num_completion_tokens,
            generation.num_cached_tokens,
        )

    @classmethod
    def counted(cls, prompt: int, completion: int, cached: int) -> Usage:
        """These counts, and their sum."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class AdapterReport(BaseModel):
    """One adapter that took part in an answer."""

    adapter: str = Field(description="name@sha256:…, usable as a model, or inline@sha256:…")
    version: int | None = Field(description="null: it came with the request")
    digest: str = Field(description="SHA-256 of the adapter file")


class ReftReport(BaseModel):
    """Which adapter answered, exactly, and how much was edited. An extension."""

    adapter: str | None = Field(
        description="name@sha256:…, usable as a model, or inline@sha256:…; null: base model"
    )
    version: int | None = Field(description="null: the base model, or it came with the request")
    digest: str | None = Field(description="SHA-256 of the adapter file")
    stack: list[AdapterReport] = Field(description="the adapters stacked on it, in order")
    num_edits: int = Field(description="(layer, site, position) triples, over all choices")

    @classmethod
    def about(
        cls, versions: Sequence[UsedAdapter], num_edits: int, *, leads: bool, **more: str
    ) -> Self:
        """The report of a request with these adapters; ``leads``: ``model`` named the first."""
        used = [
            AdapterReport(adapter=v.reference, version=v.number, digest=v.digest) for v in versions
        ]
        first = used[0] if leads else None
        return cls(
            adapter=first and first.adapter,
            version=first and first.version,
            digest=first and first.digest,
            stack=used[1:] if first else used,
            num_edits=num_edits,
            **more,
        )


class ModelReport(ReftReport):
    """One of several models that answered."""

    model: str = Field(description="as the request names it")

    @classmethod
    def of(cls, model: AnsweringModel, num_edits: int) -> ModelReport:
        """The report of a model with so many edits."""
        resolved = model.resolved
        return cls.about(resolved.versions, num_edits, leads=resolved.leads, model=model.name)


class FanOutReport(BaseModel):
    """Which models answered, and how much was edited in all. An extension."""

    models: list[ModelReport]
    num_edits: int = Field(description="(layer, site, position) triples, over all choices")


ChoiceReport = Annotated[
    ModelReport | None,
    Field(
        exclude_if=lambda report: report is None,
        description="which model answered, where reft.models asks several",
    ),
]
"""Of one choice; left out where only one model answers."""


def report_of(generation: Generation) -> ReftReport | FanOutReport:
    """The report of a generation as a whole."""
    if not generation.fans_out:
        resolved = generation.models[0].resolved
        return ReftReport.about(resolved.versions, generation.num_edits, leads=resolved.leads)
    reports = [ModelReport.of(model, generation.num_edits_of(model)) for model in generation.models]
    return FanOutReport(models=reports, num_edits=generation.num_edits)


def choice_report_of(generation: Generation, index: int) -> ModelReport | None:
    """The report of one choice, where several models answer."""
    if not generation.fans_out:
        return None
    return ModelReport.of(generation.model_of(index), generation.choice_num_edits(index))
