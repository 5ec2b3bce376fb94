"""Which adapters a request is answered with: the bodies' ``model`` and ``reft``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from reft_core.errors import InvalidRequest
from server.named import Answering, NamedAdapter


class RequestBody(BaseModel):
    """A request body: an unknown key is an error, so that a typo is never ignored."""

    model_config = ConfigDict(extra="forbid")


class AdapterOptions(RequestBody):
    """How one adapter acts."""

    strength: float | None = Field(
        None, description="multiplies the adapter's edits; 0 is the base model; default: its own"
    )
    subspaces: dict[str, float] = Field(
        default={},
        max_length=256,
        description="factor of each named subspace of the adapter; when any is given, the rest "
        "is off",
    )
    source: str | list[int] | None = Field(
        None,
        max_length=1_000_000,
        description="for interchange adapters: the prompt whose states are put in place, as text "
        "without any template or as token ids",
    )

    inline: str | None = Field(
        None,
        description="the adapter itself, as base64 of its file, where `model` is the base model; "
        "kept only while the request uses it. Servers take them only if told to",
    )

    def named(self, model: str) -> NamedAdapter:
        """The adapter that ``model`` names, with these options."""
        return NamedAdapter(model, self.strength, self.subspaces, self.source, self.inline)


class StackedAdapter(AdapterOptions):
    """An adapter that acts after the one that ``model`` names."""

    model: str = Field(max_length=256)


class ReftOptions(AdapterOptions):
    """This server's own options, an extension of OpenAI's API."""

    stack: list[StackedAdapter] = Field(
        default=[],
        max_length=8,
        description="further adapters, in the order they act: at a site that several edit, each "
        "reads what the one before wrote",
    )

    def stacked_on(self, first: NamedAdapter) -> tuple[NamedAdapter, ...]:
        """What answers where ``first`` does: it, then the adapters of the stack."""
        return (first, *(stacked.named(stacked.model) for stacked in self.stack))


class FanOutModel(AdapterOptions):
    """One of several models that answer."""

    model: str = Field(max_length=256)

    def named_beside(self, shared: AdapterOptions) -> NamedAdapter:
        """The model with its options; those of all models stand in for those it lacks."""
        strength, source = self.strength, self.source
        return NamedAdapter(
            self.model,
            shared.strength if strength is None else strength,
            self.subspaces or shared.subspaces,
            shared.source if source is None else source,
            self.inline,
            inherits=strength is None and not self.subspaces and source is None,
        )


def _as_model(value: Any) -> Any:
    """A lone name as a model without options of its own."""
    if isinstance(value, str):
        return {"model": value}
    if isinstance(value, dict | FanOutModel):
        return value
    raise ValueError("a model's name, or an object with it and its options")


_Model = Annotated[
    FanOutModel, BeforeValidator(_as_model, json_schema_input_type=str | FanOutModel)
]


class FanOutOptions(ReftOptions):
    """This server's own options of the APIs that generate text."""

    models: list[_Model] | None = Field(
        None,
        min_length=1,
        description="models that all answer, in the place of `model`, which must be the base model "
        "or one of them: names, or objects with a name and its own strength, subspaces or source. "
        "An option beside `models` is meant for every adapter among them that does not set it "
        "itself, and `stack` acts after each. Choices come model by model",
    )

    def answering(self, model: str) -> Answering:
        """The models that answer a request for ``model``, each with what is stacked on it.

        Raises :class:`InvalidRequest` for one inline adapter that is meant for many.
        """
        if self.models is not None and self.inline is not None:
            raise InvalidRequest(
                "reft.inline: expected it left out beside reft.models, whose objects each take "
                "an inline of their own",
                field="reft.inline",
            )
        if self.models is None:
            return Answering((self.stacked_on(self.named(model)),))
        named = tuple(self.stacked_on(each.named_beside(self)) for each in self.models)
        return Answering(named, beside=model)
