"""What is asked, of whom, and what comes back: the line between scoring and engines or servers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from reft_core.adapter import Adapter
from reft_core.spec import TemplateSpec
from trainer.evaluation.rows import Row

LIKELIHOOD_RULE = 2
"""Which tokens of a candidate count, as :func:`reft_core.classification.counted` says. Replies
that were noted down under another rule are asked anew."""


@dataclass(frozen=True)
class Contender:
    """A base model, or one with an adapter: whoever answers."""

    name: str
    identity: str
    """What its answers depend on besides the question: the adapter's digest, the base's name and
    dtype, a server's address. Equal identities give equal answers."""
    adapter: Adapter | None = None
    strength: float | None = None
    """Its edits are multiplied by it; None takes the adapter's own."""
    template: TemplateSpec | None = None
    """How the conversation becomes a prompt; None: by the base model's chat template."""


@dataclass(frozen=True)
class Wanted:
    """What is to be known of each row's answer."""

    text: bool = True
    """A greedy answer."""
    choice: bool = False
    """How likely each of the row's choices is."""
    loss: bool = False
    """How likely its first reference is."""
    max_tokens: int = 64
    """Of a greedy answer."""


@dataclass(frozen=True)
class Question:
    """One row for one contender."""

    contender: Contender
    row: Row
    wanted: Wanted

    @property
    def key(self) -> str:
        """Equal for questions that have the same reply, in this run or any other."""
        row, wanted, template = self.row, self.wanted, self.contender.template
        facts = {
            "rule": LIKELIHOOD_RULE,
            "contender": self.contender.identity,
            "strength": self.contender.strength,
            "template": None if template is None else template.model_dump(),
            "turns": row.turns,
            "texts": row.texts,
            "candidates": row.candidates if wanted.choice else (),
            "reference": row.references[0] if wanted.loss else None,
            "max_tokens": wanted.max_tokens if wanted.text else 0,
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What came back. Fields that were not wanted are empty."""

    text: str = ""
    finish_reason: str = ""
    logprobs: tuple[float, ...] = ()
    """Natural log of each candidate's probability, in the row's order, of the tokens that count."""
    loss: float = 0.0
    """Nats over the first reference's tokens, its end token included; of a text that is only read,
    over all but its first."""
    num_tokens: int = 0
    """Of those."""

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, object]) -> Reply:
        """From what :meth:`to_json` gave. Raises :class:`TypeError` for anything else."""
        logprobs = document.get("logprobs", ())
        if not isinstance(logprobs, list | tuple):
            raise TypeError("logprobs must be a list")
        return cls(**(document | {"logprobs": tuple(logprobs)}))  # type: ignore[arg-type]


class Asker(Protocol):
    """Gets replies, many at a time."""

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """The place and the reply of each question, as they come, in any order.

        Raises the first error; the others are given up then.
        """
