"""Which prompt tokens an adapter edits: the position rule and its arithmetic.

Pure Python on integers. Training and serving both call :meth:`PositionRule.resolve`,
so a rule means the same tokens in both; nothing else in the project computes positions.

Grammar of a rule::

    f<N>          the first N prompt tokens
    l<N>          the last N prompt tokens
    f<N>+l<M>     both; N and M need not be equal
    prompt        every prompt token
    3,0,-1        an explicit list; negative numbers count from the end

Positions are always counted on the unpadded prompt. Generated tokens are never edited.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from reft_core.errors import InvalidRequest

MAX_RULE_POSITIONS = 4096
"""Largest N or M, and largest length of an explicit list, that a rule may name."""

Anchor = Literal["prompt_end", "before_last"]
Cap = Literal["shared", "half"]

_SIDES = re.compile(r"(?:f(?P<first>\d{1,5}))?(?P<plus>\+)?(?:l(?P<last>\d{1,5}))?", re.ASCII)
_EXPLICIT = re.compile(r"-?\d{1,7}(?:,-?\d{1,7})*", re.ASCII)
_ALLOWED = "'fN', 'lN', 'fN+lM' (N, M from 1 to 4096), 'prompt', or a list such as '0,3,-1'"


@dataclass(frozen=True)
class PositionRule:
    """Prompt positions an adapter edits, and how they are split into units.

    A *unit* is one set of parameters with the positions it owns. A tied rule has one
    unit. An untied two-sided rule has two: unit 0 owns the prefix, unit 1 the suffix.

    ``anchor``
        ``prompt_end``: suffix positions count back from the last prompt token.
        ``before_last``: the last prompt token is left out, and everything is computed
        as if the prompt were one token shorter (the convention of pyreft's
        ``Reft*Dataset`` classes).
    ``cap``, on prompts too short for the rule
        ``shared``: two sides take at most half of the prompt each (rounded down); one
        side alone may take the whole prompt.
        ``half``: every side takes at most half, also alone (pyreft).
    """

    first: int = 0
    last: int = 0
    every: bool = False
    explicit: tuple[int, ...] = ()
    tied: bool = True
    anchor: Anchor = "prompt_end"
    cap: Cap = "shared"

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        tied: bool = True,
        anchor: Anchor = "prompt_end",
        cap: Cap = "shared",
    ) -> PositionRule:
        """The rule written as ``text``. Raises :class:`InvalidRequest` on bad grammar."""
        # Space may stand around + and commas; taken out elsewhere, "1 2" would become 12.
        rule = text.strip()
        for mark in "+,":
            rule = mark.join(part.strip() for part in rule.split(mark))
        if rule == "prompt":
            return cls(every=True, tied=tied, anchor=anchor, cap=cap)
        if len(rule) <= 8 * MAX_RULE_POSITIONS and _EXPLICIT.fullmatch(rule):
            explicit = tuple(int(part) for part in rule.split(","))
            if len(explicit) <= MAX_RULE_POSITIONS and len(set(explicit)) == len(explicit):
                return cls(explicit=explicit, tied=tied, anchor=anchor, cap=cap)
        sides = _SIDES.fullmatch(rule)
        if sides:
            first, last = (int(sides[side] or 0) for side in ("first", "last"))
            named = [count for count, side in ((first, "first"), (last, "last")) if sides[side]]
            plus_fits = (sides["plus"] is not None) == (len(named) == 2)
            if named and plus_fits and all(1 <= n <= MAX_RULE_POSITIONS for n in named):
                return cls(first=first, last=last, tied=tied, anchor=anchor, cap=cap)
        raise InvalidRequest.because("positions", text, _ALLOWED)

    def __str__(self) -> str:
        """The rule in the grammar above; ``parse(str(rule))`` gives it back."""
        if self.every:
            return "prompt"
        if self.explicit:
            return ",".join(str(position) for position in self.explicit)
        sides = [f"f{self.first}"] if self.first else []
        sides += [f"l{self.last}"] if self.last else []
        return "+".join(sides)

    @property
    def num_units(self) -> int:
        """Parameter sets this rule needs: 2 for an untied two-sided rule, else 1."""
        return 2 if self.first and self.last and not self.tied else 1

    def resolve(self, prompt_len: int) -> tuple[tuple[int, ...], ...]:
        """Absolute positions each unit edits in a prompt of ``prompt_len`` tokens.

        One ascending tuple a unit, disjoint across units. Explicit positions that a short
        prompt does not have are left out, as the sides of ``fN+lM`` shrink.
        """
        length = prompt_len - 1 if self.anchor == "before_last" else prompt_len
        if length <= 0:
            return ((),) * self.num_units
        if self.every:
            return (tuple(range(length)),)
        if self.explicit:
            found = {p if p >= 0 else length + p for p in self.explicit}
            return (tuple(sorted(p for p in found if 0 <= p < length)),)
        prefix, suffix = _sides(length, self.first, self.last, self.cap)
        return (prefix, suffix) if self.num_units == 2 else (prefix + suffix,)

    def first_edited(self, prompt_len: int) -> int:
        """First edited position of a prompt, or ``prompt_len`` if none is edited.

        Key-value entries before it are the base model's and shared by every adapter.
        """
        edited = [unit[0] for unit in self.resolve(prompt_len) if unit]
        return min(edited, default=prompt_len)


def _sides(length: int, first: int, last: int, cap: Cap) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prefix and suffix positions of ``f{first}+l{last}`` on ``length`` tokens."""
    both_sides = first > 0 and last > 0
    most = length // 2 if both_sides or cap == "half" else length
    num_last = min(last, most)
    return tuple(range(min(first, most))), tuple(range(length - num_last, length))
