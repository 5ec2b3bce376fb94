"""Endings of module paths, which PEFT takes as regular expressions.

PEFT matches ``(.*\\.)?(text)$`` against a module's path, so text is either the path's last names
or a stranger's expression, and those can be made to run for ever: by repeats inside repeats, and
by a row of groups such as ``(a|aa)``, whose choices multiply. Names are compared as they are;
of expressions only few and simple ones are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from reft_core.convert.peft.folder import CONFIG_FILE
from reft_core.convert.reading import invalid

MAX_PATTERNS = 4096

_MAX_EXPRESSIONS = 16
"""Patterns that are more than names, in one field."""
_MAX_TEXT = 256
_MAX_MARKS = {"*+?{(": 2, "|": 6}
"""How often an expression may repeat or group, together, and how often choose."""
_NAMES = re.compile(r"[\w.]+")
_COSTLY = re.compile(r"\(\?|\)[*+?{]|\\[1-9]")
"""Group extensions, repeated groups and references back to a group."""


@dataclass(frozen=True)
class Ending:
    """What a path may end with."""

    expression: re.Pattern[str]
    length: int | None
    """Characters it matches; None if that varies."""

    def ends(self, path: str) -> bool:
        """Whether the pattern is the whole path or its last names."""
        if self.length is None:
            return self.expression.match(path) is not None
        start = len(path) - self.length
        if start < 0 or (start > 0 and path[start - 1] != "."):
            return False
        return self.expression.match(path, start) is not None


def parse_endings(texts: Iterable[str], field: str) -> list[Ending]:
    """Each pattern of the config's ``field``.

    Raises :class:`AdapterFileInvalid` for one that is no expression, or not a simple one.
    """
    endings = []
    num_expressions = 0
    for text in texts:
        if len(text) <= _MAX_TEXT and _NAMES.fullmatch(text):
            endings.append(Ending(re.compile(text), len(text)))  # a dot is any character
            continue
        num_expressions += 1
        if num_expressions > _MAX_EXPRESSIONS:
            raise invalid(
                CONFIG_FILE, field, text, f"at most {_MAX_EXPRESSIONS} patterns that are no names"
            )
        endings.append(Ending(_expression(text, field), None))
    return endings


def _expression(text: str, field: str) -> re.Pattern[str]:
    """PEFT's regular expression for ``text``, if it cannot take long."""
    simple = len(text) <= _MAX_TEXT and not _COSTLY.search(text)
    for marks, most in _MAX_MARKS.items():
        simple = simple and sum(text.count(mark) for mark in marks) <= most
    if simple:
        try:
            return re.compile(rf"(.*\.)?({text})$")
        except (re.error, RecursionError, OverflowError):
            pass
    raise invalid(CONFIG_FILE, field, text, "the end of a module's path, or a simple pattern of it")
