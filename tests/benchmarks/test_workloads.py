from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.workloads import WORKLOADS, data_passages, own_passages, prompts_of, spread


def encode(text: str) -> list[int]:
    """A token for each word."""
    return [len(word) for word in text.split()]


def test_lengths_are_what_the_titles_say() -> None:
    a, b, c, d = (WORKLOADS[name] for name in "abcd")
    assert a.input_lengths == (64,) * 16
    assert len(b.input_lengths) == 16
    assert (min(b.input_lengths), max(b.input_lengths)) == (82, 218)
    assert len(c.input_lengths) == 64
    assert d.num_generated == 64
    assert a.num_generated == 1024
    assert b.title == "b: 16 x 82 to 218 in / 64 out"


def test_spread_holds_both_ends_and_mixes() -> None:
    lengths = spread(10, 20, 11)
    assert sorted(lengths) == list(range(10, 21))
    assert list(lengths) != sorted(lengths)
    assert spread(10, 20, 11) == lengths
    assert spread(5, 9, 1) == (5,)


def test_prompts_have_their_lengths_and_differ() -> None:
    prompts = prompts_of((64,) * 16, own_passages(), encode, seed=0)
    assert [len(prompt) for prompt in prompts] == [64] * 16
    assert len({tuple(prompt) for prompt in prompts}) == 16
    assert prompts == prompts_of((64,) * 16, own_passages(), encode, seed=0)


def test_no_two_prompts_begin_alike() -> None:
    prompts = prompts_of(WORKLOADS["c"].input_lengths, own_passages(), encode, seed=1)
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 64


def test_short_passages_are_repeated() -> None:
    (prompt,) = prompts_of((10,), ["one two three"], encode, seed=0)
    assert prompt == [3, 3, 5, 3, 3, 5, 3, 3, 5, 3]


def test_data_folder(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    rows = [{"instruction": "Add the numbers."}, {"text": "It rained."}, {"label": 1}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted(data_passages(tmp_path)) == ["Add the numbers.", "It rained."]
    with pytest.raises(ValueError, match=r"\*\.jsonl"):
        data_passages(folder / "nothing")
