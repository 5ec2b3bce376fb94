from __future__ import annotations

import pytest

from reft_core.classification import counted, label_tokens
from reft_core.classification.labels import as_shown, as_written
from reft_core.errors import InvalidRequest
from tests.trainer.factories import byte_tokenizer

END = 9


@pytest.mark.parametrize(
    ("bare", "ends"),
    [
        ([(1,), (2,), (3, 4)], False),
        ([(1, 2), (1, 3)], False),
        ([(1, 2), (3,), (1,)], True),
        ([(1, 5), (1, 2, 3), (1, 2)], True),
        ([(1,), (1,)], True),
        ([(), (1,)], True),
        ([(1, 2)], False),
    ],
)
def test_the_end_counts_only_where_one_answer_begins_another(
    bare: list[tuple[int, ...]], ends: bool
) -> None:
    whole = [(*tokens, END) for tokens in bare]
    assert counted(whole) == (whole if ends else bare)


def test_labels_are_tokens() -> None:
    tokenizer = byte_tokenizer()
    bare = [tuple(tokenizer(label)["input_ids"]) for label in (" no", " yes")]
    assert label_tokens(tokenizer, [" no", " yes"]) == bare
    end = tokenizer.eos_token_id
    assert label_tokens(tokenizer, [" no", " no way"])[0] == (*bare[0], end)
    tokenizer.eos_token = None
    with pytest.raises(InvalidRequest, match="model: its tokenizer has no end-of-text token"):
        label_tokens(tokenizer, ["a", "b"])


def test_labels_are_shown_without_the_space_they_are_written_with() -> None:
    own = (" NUM", " DESC")
    assert as_shown(own) == ("NUM", "DESC")
    assert as_written(["DESC", " NUM", "LOC"], own) == (" DESC", " NUM", "LOC")
    for alike in ((" a", "a"), (" ", "b")):
        assert as_shown(alike) == alike
        assert as_written(alike, alike) == alike
