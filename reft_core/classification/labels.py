"""Labels as people read them, as an adapter writes them, and the tokens their likelihood is of.

One rule for training, evaluation and serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from reft_core.errors import InvalidRequest

Tokens = tuple[int, ...]


def label_tokens(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[Tokens]:
    """The tokens of each label that count; see :func:`counted`.

    Raises :class:`InvalidRequest` if the tokenizer has no end-of-text token.
    """
    return counted([answer_tokens(tokenizer, label) for label in labels])


def answer_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """The tokens of a whole answer, its end token included, as it is learnt.

    Raises :class:`InvalidRequest` if the tokenizer has none.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InvalidRequest("model: its tokenizer has no end-of-text token", field="model")
    return (*tokenizer(text, add_special_tokens=False)["input_ids"], end)


def counted(answers: Sequence[Sequence[int]]) -> list[Tokens]:
    """``answers`` without the end tokens they have, unless one would begin another then.

    Of answers that differ before they end, the tokens up to there say which one is meant. How
    readily a model stops behind each says little of that: a base model seldom stops behind a
    bare label, and would be judged by where it does.
    """
    bare = [tuple(answer[:-1]) for answer in answers]
    ordered = sorted(bare)  # what begins others stands directly before one of them
    begins = any(later[: len(earlier)] == earlier for earlier, later in pairwise(ordered))
    return [tuple(answer) for answer in answers] if begins or () in bare else bare


def as_shown(labels: Sequence[str]) -> tuple[str, ...]:
    """An adapter's labels for people: without the space that its answers begin with.

    As they are where that would make two alike, or one empty.
    """
    shown = tuple(label.strip() for label in labels)
    return shown if all(shown) and len(set(shown)) == len(labels) else tuple(labels)


def as_written(labels: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """``labels`` as the adapter writes them whose ``own`` labels these are.

    A label that it has not, or has exactly so, stays as it is.
    """
    written = dict(zip(as_shown(own), own, strict=True))
    return tuple(label if label in own else written.get(label.strip(), label) for label in labels)
