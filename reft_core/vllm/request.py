"""How a request to vLLM names its adapters.

Under ``SamplingParams.extra_args["reft"]`` stands a document::

    {"adapters": [{"digest": "9f2c…", "strength": 0.5}, {"name": "sentiment"}]}

Over HTTP it is ``vllm_xargs``, whose values are strings, numbers and lists: there the document is
a string of JSON, or simply the name or digest of one adapter. Adapters act in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from reft_core.engine.interface import Request
from reft_core.errors import InvalidRequest, UnsupportedFeature, explain, shown
from reft_core.spec import DIGEST_PATTERN, AdapterName

KEY = "reft"
"""Of the document in ``extra_args``."""
MAX_ADAPTERS = 16
_Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Wanted(_Document):
    """One adapter as a request asks for it, by digest or by name."""

    digest: _Digest | None = None
    name: AdapterName | None = None
    strength: float | None = Field(default=None, description="absent: the adapter's own")
    subspaces: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if (self.digest is None) == (self.name is None):
            raise ValueError("expected either a digest or a name")
        return self


class Asked(_Document):
    """Adapters in the order they act, and where the prompt ends that they edit."""

    adapters: tuple[Wanted, ...] = Field(max_length=MAX_ADAPTERS)
    prompt_len: int | None = Field(
        default=None,
        ge=1,
        description="tokens of the prompt, if an answer to be scored follows it; absent: all",
    )


def to_extra_args(request: Request) -> dict[str, Any]:
    """``extra_args`` for the adapters of one of our requests; empty for the base model.

    Raises :class:`UnsupportedFeature` for the source prompt of an interchange.
    """
    if any(choice.source for choice in request.adapters):
        raise UnsupportedFeature(
            "source: an interchange takes states of another prompt, which vLLM does not keep; "
            "the embedded engine does",
            field="source",
        )
    adapters: list[dict[str, Any]] = []
    for choice in request.adapters:
        asked: dict[str, Any] = {"digest": choice.digest}
        if choice.strength is not None:
            asked["strength"] = choice.strength
        if choice.subspaces:
            asked["subspaces"] = dict(choice.subspaces)
        adapters.append(asked)
    if not adapters:
        return {}
    document: dict[str, Any] = {"adapters": adapters}
    if request.completion:
        document["prompt_len"] = len(request.prompt)
    return {KEY: document}


def from_extra_args(extra_args: Mapping[str, Any] | None) -> Asked:
    """What a request's ``extra_args`` ask for; no adapters for the base model.

    Raises :class:`InvalidRequest` naming the field that is wrong.
    """
    found = (extra_args or {}).get(KEY)
    if found is None:
        return Asked(adapters=())
    try:
        if not isinstance(found, str):
            return Asked.model_validate(found)
        if found.lstrip().startswith("{"):
            return Asked.model_validate_json(found)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in (KEY, *problem["loc"]))
        raise InvalidRequest(
            f"{shown(place)}: {problem['msg']}, got {shown(repr(problem['input']))}", field=place
        ) from None
    return Asked(adapters=(_named(found),))


def _named(text: str) -> Wanted:
    """One adapter by its digest or name alone."""
    for field in ("digest", "name"):
        try:
            return Wanted.model_validate({field: text})
        except ValidationError:
            continue
    raise InvalidRequest(
        explain(KEY, text, "an adapter's name or digest, or a JSON object"), field=KEY
    )
