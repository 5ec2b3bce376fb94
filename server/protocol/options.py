"""Which adapters a request is answered with: the bodies' ``model`` and ``reft``."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from reft_core.errors import InvalidRequest
from server.answering.named import Answering, NamedAdapter

_NUMBERS = (int, float)
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: (_NUMBERS, "a whole number"),
    float: (_NUMBERS, "a number"),
}


class RequestBody(BaseModel):
    """A request body: an unknown key is an error, so that a typo is never ignored.

    Values have the type that the API declares; none is made of text, or of another type.
    """

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_type(cls, value: Any, about: ValidationInfo) -> Any:
        assert about.field_name is not None
        declared = cls.model_fields[about.field_name].annotation
        options = list(get_args(declared)) if get_origin(declared) is UnionType else [declared]
        values = [value]
        if isinstance(value, list | dict):
            options = [get_args(each)[-1] for each in options if get_origin(each) is type(value)]
            values = list(value.values()) if isinstance(value, dict) else value
        for each in values:
            # Half of a character, which JSON can spell and no tokenizer can read.
            if isinstance(each, str) and not each.isascii() and not _is_whole(each):
                raise ValueError("text of whole characters, without lone surrogates")
        numeric = [each for each in options if each in _KINDS]
        if len(numeric) == len(options) - (NoneType in options) == 1:
            kinds, expected = _KINDS[numeric[0]]
            if not all(each is None or type(each) in kinds for each in values):
                raise ValueError(expected)
        return value


def _is_whole(text: str) -> bool:
    """Whether all of ``text`` can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
