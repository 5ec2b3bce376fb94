"""Which tokens of a sample prompt an adapter edits, as JSON values."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from reft_core.positions import PositionRule
from reft_core.vocabulary import Vocabulary

MOST_SHOWN = 400
"""Tokens of a prompt; of a longer one the middle is left out."""


def drawn_prompt(
    tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, rule: PositionRule | None
) -> dict[str, object]:
    """The tokens' texts in order, each with the unit that edits it, or None; no rule: no edits."""
    units = () if rule is None else rule.resolve(len(tokens))
    unit_of = {place: number for number, unit in enumerate(units) for place in unit}
    describe = Vocabulary(tokenizer).describe
    return {
        "num_tokens": len(tokens),
        "units": [len(unit) for unit in units],
        "tokens": [
            {"position": place, "text": describe(tokens[place])[0], "unit": unit_of.get(place)}
            for place in _shown(len(tokens))
        ],
    }


def _shown(length: int) -> list[int]:
    if length <= MOST_SHOWN:
        return list(range(length))
    half = MOST_SHOWN // 2
    return [*range(half), *range(length - half, length)]
