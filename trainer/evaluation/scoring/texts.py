"""Checks of one generated answer against a reference. Pure Python on text."""

from __future__ import annotations

import json
import re

from trainer.evaluation.scoring.extraction import last_number as number_in

_NEAR = 1e-3


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


def last_number(answer: str, reference: str) -> bool:
    """The last number of both is the same, to 0.001, as in the ReFT paper's arithmetic tasks."""
    said, wanted = number_in(answer), number_in(reference)
    return bool(said and wanted) and abs(float(said) - float(wanted)) <= _NEAR
