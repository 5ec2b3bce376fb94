"""Adapters as a request names them, and what the names mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial

from transformers import PreTrainedTokenizerBase

from reft_core.engine.interface import AdapterChoice
from reft_core.errors import (
    AdapterError,
    AdapterNotFound,
    InvalidRequest,
    PermissionDenied,
    RequestFailed,
    explain,
)
from reft_core.templates import encode_text
from server.answering.inline import InlineAdapter, InlineReader
from server.keys import Principal
from server.registry import Registry, Version

UsedAdapter = Version | InlineAdapter
"""An adapter that takes part in an answer: registered, or brought by the request."""


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter as a request names it, with its options; see :class:`AdapterChoice`."""

    model: str
    strength: float | None = None
    subspaces: Mapping[str, float] = field(default_factory=dict)
    source: str | Sequence[int] | None = None
    inline: str | None = None
    """The adapter itself, as base64 of its file, where ``model`` is the base model."""
    inherits: bool = False
    """Whether its options are meant for all models of a fan-out; the base model goes without."""


@dataclass(frozen=True)
class Answering:
    """Who answers a request."""

    named: tuple[tuple[NamedAdapter, ...], ...]
    """For each model: what it is, perhaps the base model, then the adapters stacked on it."""
    beside: str | None = None
    """What the request has as its ``model`` where ``reft.models`` says who answers."""

    def about(self, place: int) -> AbstractContextManager[None]:
        """Errors in this context are about one of the models, and say so if they are several."""
        return nullcontext() if self.beside is None else _about(f"reft.models[{place}]")


@dataclass(frozen=True)
class Resolved:
    """The adapters of one request, as the registry and the engine know them, in order."""

    versions: tuple[UsedAdapter, ...]
    choices: tuple[AdapterChoice, ...]
    leads: bool
    """Whether the request's ``model`` names the first of them, and not the base model."""

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that trained prefixes take before the prompt; none where they are off."""
        return sum(
            version.spec.prefix.length
            for version, choice in zip(self.versions, self.choices, strict=True)
            if version.spec.prefix is not None and choice.strength != 0
        )


def resolve(
    named: Sequence[NamedAdapter],
    registry: Registry,
    inline: InlineReader,
    encode: Callable[[str], Sequence[int]],
    principal: Principal,
) -> Resolved:
    """What ``model`` means, perhaps the base model, and the adapters stacked on it.

    Blocks on the catalog, on adapters that the request brings, and on ``encode``, which tokenises
    a source's text. The base model has no options and cannot be stacked on something; raises
    :class:`InvalidRequest` then, :class:`AdapterNotFound`, :class:`PermissionDenied` for what the
    principal can see but not use, and what reading an adapter raises.
    """
    versions: list[UsedAdapter] = []
    choices: list[AdapterChoice] = []
    for place, each in enumerate(named):
        version: UsedAdapter | None = look_up(each.model, registry, principal)
        if each.inline is not None:
            version = _read_inline(each, place, version, inline, principal)
        if version is None:
            _check_base(each, place)
            continue
        versions.append(version)
        source = each.source or ()
        tokens = encode(source) if isinstance(source, str) else source
        choices.append(AdapterChoice(version.digest, each.strength, each.subspaces, tuple(tokens)))
    return Resolved(tuple(versions), tuple(choices), leads=len(versions) == len(named))


def look_up(model: str, registry: Registry, principal: Principal) -> Version | None:
    """What ``model`` means to a principal that may use it; None for the base model.

    Blocks on the catalog. Raises :class:`PermissionDenied`, and :class:`AdapterNotFound`, which
    names what there is only to those who may use all of it.
    """
    try:
        version = registry.resolve(model, tenant=principal.tenant)
    except AdapterNotFound:
        if principal.may_use_all:
            raise
        allowed = "one of those that GET /v1/models lists for this key"
        raise AdapterNotFound(explain("model", model, allowed), field="model") from None
    principal.check_may_use(model if version is None else version.name)
    return version


def resolve_all(
    answering: Answering,
    registry: Registry,
    inline: InlineReader,
    tokenizer: PreTrainedTokenizerBase,
    principal: Principal,
) -> list[Resolved]:
    """What every model that answers means; see :func:`resolve`.

    Raises :class:`InvalidRequest` also if ``model`` is neither the base model nor one of several.
    """
    found = []
    encode = cache(partial(encode_text, tokenizer))  # many models may share one long source
    for place, named in enumerate(answering.named):
        with answering.about(place):
            found.append(resolve(named, registry, inline, encode, principal))
    beside, names = answering.beside, [named[0].model for named in answering.named]
    if beside is None or beside in names:
        return found
    if beside != registry.base_name:
        raise InvalidRequest.because("model", beside, "the base model, or one of reft.models")
    return found


@contextmanager
def _about(place: str) -> Iterator[None]:
    try:
        yield
    except (InvalidRequest, AdapterError, PermissionDenied, RequestFailed) as error:
        raise error.within(place) from error


def _read_inline(
    named: NamedAdapter,
    place: int,
    registered: UsedAdapter | None,
    reader: InlineReader,
    principal: Principal,
) -> InlineAdapter:
    """The adapter that the request brings in a place where it may name only the base model."""
    where = f"reft.stack[{place - 1}]." if place else ""
    if registered is not None:
        allowed = "the base model, beside an inline adapter"
        raise InvalidRequest.because(f"{where}model", named.model, allowed)
    assert named.inline is not None, "asked only of adapters that are inline"
    field = f"{where or 'reft.'}inline"
    principal.check_may_bring(field)
    return reader.read(named.inline, field)


def _check_base(named: NamedAdapter, place: int) -> None:
    """Refuse the base model where it can mean nothing."""
    if place > 0:
        raise InvalidRequest.because("reft.stack", named.model, "names of adapters")
    if named.inherits:
        return
    for option in ("strength", "subspaces", "source"):
        if (value := getattr(named, option)) not in (None, {}):
            raise InvalidRequest.because(
                f"reft.{option}", value, "nothing, since the base model has no edits"
            )
