"""How good one answer is, and what a set of answers adds up to. Pure Python on text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

OTHER = "(other)"
"""Column of the confusion matrix for answers that are no label."""

AnswerCheck = Callable[[str, str], bool]
"""Whether an answer is right, given the reference answer."""


def exact_match(answer: str, reference: str) -> bool:
    """The reference itself, white space around either aside."""
    return answer.strip() == reference.strip()


def valid_json(answer: str, reference: str) -> bool:
    """One JSON object on one line with the reference's keys, each value of the same type."""
    found, wanted = _json_object(answer), _json_object(reference)
    if found is None or wanted is None or "\n" in answer.strip():
        return False
    return {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in wanted.items()
    }


def _json_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a model may answer with brackets alone
        return None
    return value if isinstance(value, dict) else None


def emoji_only(answer: str, reference: str) -> bool:
    """At least one emoji, and nothing else but white space."""
    return _EMOJI_TEXT.fullmatch(answer) is not None


# Written as ranges because neither re nor unicodedata knows Unicode's emoji property.
_PICTOGRAPH = (
    "[\U0001f000-\U0001faff\u231a-\u23ff\u24c2\u25aa-\u25fe\u2600-\u27bf\u2934\u2935\u2b05-\u2b55"
    "\u2194-\u21aa\u203c\u2049\u2122\u2139\u3030\u303d\u3297\u3299\u00a9\u00ae]"
)
_KEYCAP = "[0-9#*]\ufe0f?\u20e3"
# Variation selector, zero-width joiner, and the tags that spell a regional flag.
_MODIFIER = "[\ufe0f\u200d\U000e0020-\U000e007f]"
_EMOJI_TEXT = re.compile(rf"\s*(?:(?:{_PICTOGRAPH}|{_KEYCAP}){_MODIFIER}*\s*)+")


METRICS: dict[str, AnswerCheck] = {
    check.__name__: check for check in (exact_match, valid_json, emoji_only)
}
"""Checks a config may name."""


def score(name: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that pass the check called ``name``."""
    assert answers, "no answers to score"
    assert len(answers) == len(references)
    check = METRICS[name]
    return sum(map(check, answers, references)) / len(answers)


@dataclass(frozen=True)
class Confusion:
    """Counts of answers by reference label."""

    labels: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    """For each reference label, the answers given; :data:`OTHER` for no label at all."""

    def accuracy(self, label: str) -> float | None:
        """Share of this label's rows answered with it; None if it has no rows."""
        row = self.counts[label]
        total = sum(row.values())
        return row[label] / total if total else None


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
