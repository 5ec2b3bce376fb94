"""Answers of one method to one split, whatever the metric needs to know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.scoring import Answered

References = tuple[str, ...]
"""The right answers to one row, at least one; what is trained on is the first."""


@dataclass(frozen=True)
class Answers:
    """What a metric needs of each row, in order; the other lists are empty."""

    choices: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    losses: tuple[tuple[float, int], ...] = ()
    """Summed loss and number of tokens."""

    def against(self, references: Sequence[References]) -> list[Answered]:
        """The rows as metrics look at them."""
        for answers in (self.choices, self.texts, self.losses):
            assert not answers or len(answers) == len(references), "answers to other rows"
        return [
            Answered(
                right,
                answer=right[0],
                text=self.texts[index] if self.texts else "",
                predicted=self.texts[index] if self.texts else "",
                choice=self.choices[index] if self.choices else "",
                loss=self.losses[index][0] if self.losses else 0.0,
                num_tokens=self.losses[index][1] if self.losses else 0,
            )
            for index, right in enumerate(references)
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"choices": self.choices, "texts": self.texts, "losses": self.losses}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Answers:
        """From what :meth:`to_json` gave."""
        losses = tuple((float(loss), int(count)) for loss, count in document["losses"])
        return cls(tuple(document["choices"]), tuple(document["texts"]), losses)
