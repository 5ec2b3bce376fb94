"""Which label was answered where which was right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OTHER = "(other)"
"""Column of the confusion matrix for answers that are no label."""


@dataclass(frozen=True)
class Confusion:
    """Counts of answers by reference label."""

    labels: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    """For each reference label, the answers given; :data:`OTHER` for no label at all."""


def confusion(
    labels: Sequence[str], answers: Sequence[str], references: Sequence[str]
) -> Confusion:
    """The confusion matrix of a labeller; white space around answers does not count."""
    names = tuple(label.strip() for label in labels)
    pairs = Counter(
        (reference.strip(), answer.strip() if answer.strip() in names else OTHER)
        for answer, reference in zip(answers, references, strict=True)
    )
    counts = {label: {got: pairs[label, got] for got in (*names, OTHER)} for label in names}
    return Confusion(names, counts)
