"""The benchmark of training steps: its rows, its workers that need no environment, its sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.soak.world import save_tiny_model
from benchmarks.training.__main__ import _figures, _table, summary
from benchmarks.training.naive_worker import Naive
from benchmarks.training.own_worker import Reft
from benchmarks.training.rows import make_batches, with_positions
from benchmarks.training.steps import IGNORED, pad_right

PASSAGES = [f"passage number {'x' * n}" for n in range(12)]


def encode(text: str) -> list[int]:
    return [3 + ord(letter) % 50 for letter in text][-40:]


def batches(rule: str) -> list[list[dict[str, list[int]]]]:
    made = make_batches(PASSAGES, encode, 2, batch_size=3, num_batches=2)
    return with_positions(made, rule)


def test_rows_are_distinct_and_know_their_edited_positions() -> None:
    made = batches("f2+l3")
    assert [len(batch) for batch in made] == [3, 3]
    for batch in made:
        for row in batch:
            assert row["completion"][-1] == 2
            count = len(row["prompt"])
            assert row["positions"] == [0, 1, count - 3, count - 2, count - 1]
    with pytest.raises(ValueError, match="got 12 texts that are short enough, expected 100"):
        make_batches(PASSAGES, encode, 2, batch_size=100, num_batches=1)


def test_padding_carries_no_loss() -> None:
    batch = pad_right([{"prompt": [5, 6], "completion": [7]}, {"prompt": [8], "completion": [9]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]


@pytest.mark.parametrize("rule", ["l1", "f7+l7"])
def test_the_naive_step_learns_the_same(rule: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=0)
    losses = []
    for learner in (Reft(), Naive()):
        settings = {"rule": rule, "batches": batches(rule)}
        about = learner.load(str(tmp_path), "float32", torch.get_num_threads(), settings)
        assert about["num_trainable"] > 0
        epochs = [learner.epoch() for _ in range(2)]
        assert all(step > 0 for epoch in epochs for step in epoch["ms"])
        losses.append([loss for epoch in epochs for loss in epoch["losses"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][2] < losses[0][0]


def epochs_of(*ms: float) -> list[dict[str, object]]:
    return [{"ms": [one, one], "losses": [1.0, 1.0], "peak_mib": one} for one in ms]


def test_ratios_are_taken_within_a_turn_and_leave_the_first_epoch_out() -> None:
    ours, theirs = epochs_of(50, 10, 20), epochs_of(90, 40, 60)
    found = _figures(theirs, ours)
    assert found["over_ours"] == [3.0, 3.5, 4.0]
    assert found["first_epoch_over_ours"] == 1.8
    assert found["peak_mib"] == 90


def test_the_summary_takes_the_least_of_the_dtypes_and_owns_up_to_a_missing_peer() -> None:
    peer = {name: {"over_ours": [1.0, 6.0, 9.0]} for name in ("pyreft", "peft_lora")}
    other = {"pyreft": {"over_ours": [1.0, 4.0, 9.0]}, "peft_lora": {"missing": "no network"}}
    results = {"float32": {"l1": peer, "f7+l7": peer}, "bfloat16": {"l1": other, "f7+l7": peer}}
    assert summary(results) == {
        "vs_pyreft_suffix": 4.0,
        "vs_pyreft_prefix_suffix": 6.0,
        "vs_peft_lora_suffix": None,
    }
    assert "missing: no network" in _table("bfloat16, l1", {"peft_lora": other["peft_lora"]})
