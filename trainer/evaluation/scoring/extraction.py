"""The short answer inside a generated one. Pure functions of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

Extractor = Callable[[str, Sequence[str]], str]
"""The short answer in a text, given the row's choices; empty if there is none."""

TRIGGER = "the correct answer is "
"""What precedes the answer in the commonsense tasks of LLM-Adapters and of the ReFT paper."""

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"[A-E]")
_FENCE = re.compile(r"```(?:\w+)?\n(.*?)(?:```|\Z)", re.DOTALL)


def whole(text: str, choices: Sequence[str] = ()) -> str:
    """The text itself, white space around it aside."""
    return text.strip()


def after_trigger(text: str, choices: Sequence[str] = ()) -> str:
    """All that follows the first :data:`TRIGGER`, as pyreft's ``extract_output`` takes it.

    Nothing without the trigger: a model that does not use the form has not answered.
    """
    _, found, rest = text.partition(TRIGGER)
    return rest.strip() if found else ""


def last_number(text: str, choices: Sequence[str] = ()) -> str:
    """The last number, commas removed: ``extract_answer_number`` of LLM-Adapters and pyreft."""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else ""


def first_letter(text: str, choices: Sequence[str] = ()) -> str:
    """The first capital letter from A to E, wherever it stands: ``extract_answer_letter`` there.

    The A of a sentence that begins "A train ..." counts; published AQuA figures are made so.
    """
    found = _LETTER.search(text)
    return found.group() if found else ""


def leading_choice(text: str, choices: Sequence[str]) -> str:
    """The choice that the text is, or begins with as whole words; the longest of several.

    Capitals and white space around it do not count: ``Positive.`` is ``positive``.
    """
    said = text.strip().casefold()
    for choice in sorted(choices, key=len, reverse=True):
        wanted = choice.strip().casefold()
        if wanted and said.startswith(wanted) and not _goes_on(said[len(wanted) :]):
            return choice
    return ""


def mentioned_choice(text: str, choices: Sequence[str]) -> str:
    """The choice that occurs first in the text as whole words; the longest of several."""
    said = text.casefold()
    best, best_at = "", len(said)
    for choice in sorted(choices, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(choice.strip().casefold())}(?!\w)"
        found = re.search(pattern, said) if choice.strip() else None
        if found and found.start() < best_at:
            best, best_at = choice, found.start()
    return best


def sql_query(text: str, choices: Sequence[str] = ()) -> str:
    """The first SQL statement: that of a code fence if there is one, up to its semicolon."""
    fenced = _FENCE.search(text)
    query = (fenced.group(1) if fenced else text).strip()
    return query.partition(";")[0].strip()


EXTRACTORS: Mapping[str, Extractor] = {
    "whole": whole,
    "leading_choice": leading_choice,
    "mentioned_choice": mentioned_choice,
    "after_trigger": after_trigger,
    "last_number": last_number,
    "first_letter": first_letter,
    "sql": sql_query,
}
"""By the names that ``--extract`` takes."""


def _goes_on(rest: str) -> bool:
    """Whether a word that has just ended goes on after all."""
    return bool(rest) and (rest[0].isalnum() or rest[0] == "_")
