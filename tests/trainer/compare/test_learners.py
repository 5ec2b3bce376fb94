"""Every kind of method trains, ships what it trained, and leaves the base as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.compare.factories import tiny_comparison, tiny_task
from trainer.collate import Collator
from trainer.compare.answering import score_answers, serving_base
from trainer.compare.arena import arena_for
from trainer.compare.baseline import BaselineModel, to_left_edge
from trainer.compare.choosing import row_losses
from trainer.compare.contenders import CONTENDERS
from trainer.compare.learners import open_learner
from trainer.compare.settings import training_config
from trainer.compare.task import Task
from trainer.data import TokenisedExample
from trainer.fit import FitResult, fit
from trainer.progress import SilentProgress

SETTINGS: dict[str, dict[str, float]] = {
    "peft_lora": {"learning_rate": 1e-2, "rank": 2},
    "peft_prefix_tuning": {"learning_rate": 5e-2, "prefix_length": 3},
    "peft_prompt_tuning": {"learning_rate": 1e-1, "prefix_length": 4},
    "full_finetuning": {"learning_rate": 1e-3},
    "head_only": {"learning_rate": 1e-1},
    "loreft": {"learning_rate": 1e-2, "rank": 2},
    "series_adapter": {"learning_rate": 1e-2, "rank": 4},
    "bitfit": {"learning_rate": 1e-2},
    "lora": {"learning_rate": 1e-2, "rank": 2},
    "mam": {"learning_rate": 1e-2, "prefix_length": 3},
}


def trained(task: Task, name: str, folder: Path) -> tuple[object, FitResult]:
    """The config of a method, and how its training went."""
    comparison = tiny_comparison(folder, methods=(name,))
    config = training_config(arena_for(task), CONTENDERS[name], SETTINGS[name], 0, comparison)  # type: ignore[arg-type]
    collator = Collator(config.rule)
    with open_learner(CONTENDERS[name], config, task) as learner:
        return config, fit(
            learner.model, task.train.rows, task.valid.rows, config, collator, SilentProgress()
        )


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path: Path, name: str) -> None:
    task = tiny_task(tmp_path, epochs=2)
    model = task.loaded.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    logits = model(torch.arange(9)[None]).logits
    _, result = trained(task, name, tmp_path)
    assert result.epochs[-1].valid_loss < result.epochs[0].valid_loss
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(not parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(torch.arange(9)[None]).logits, logits)


def test_full_finetuning_of_a_bfloat16_base_learns_in_float32(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    task.loaded.model.to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in task.loaded.model.state_dict().items()}
    comparison = tiny_comparison(tmp_path, methods=("full_finetuning",))
    contender = CONTENDERS["full_finetuning"]
    config = training_config(arena_for(task), contender, {"learning_rate": 1e-6}, 0, comparison)
    with open_learner(contender, config, task) as learner:
        start = [p.detach().clone() for p in learner.model.trainable()]
        assert all(p.dtype == torch.float32 for p in start)
        rows = task.train.rows
        result = fit(learner.model, rows, rows[:8], config, Collator(config.rule), SilentProgress())
        assert not all(map(torch.equal, start, learner.model.trainable()))
        assert learner.save(result).num_bytes == 2 * sum(p.numel() for p in start)
    after = task.loaded.model.state_dict()
    assert all(t.dtype == torch.bfloat16 for t in after.values() if t.is_floating_point())
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    "name", ["peft_lora", "peft_prefix_tuning", "peft_prompt_tuning", "loreft"]
)
def test_our_engine_serves_what_was_trained(tmp_path: Path, name: str) -> None:
    task = tiny_task(tmp_path)
    comparison = tiny_comparison(tmp_path, methods=(name,))
    config = training_config(arena_for(task), CONTENDERS[name], SETTINGS[name], 0, comparison)  # type: ignore[arg-type]
    collator = Collator(config.rule)
    rows = task.valid.rows
    with open_learner(CONTENDERS[name], config, task) as learner:
        model = learner.model
        result = fit(model, task.train.rows, rows, config, collator, SilentProgress())
        saved = learner.save(result)
        losses = [loss for loss, _ in row_losses(model, rows, collator, 4)]
        num_trainable = sum(p.numel() for p in model.trainable())
    assert saved.num_bytes > 4 * num_trainable
    assert saved.adapter is not None
    with serving_base(task.loaded, [saved.adapter], 64) as engine:
        served = score_answers(engine, rows, saved.adapter)
    torch.testing.assert_close(torch.tensor(served), -torch.tensor(losses), atol=1e-4, rtol=1e-4)


def test_rows_begin_in_the_first_column_and_predict_the_same(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    rows = [TokenisedExample((1, 2, 3, 4, 5), (7, 8)), TokenisedExample((6, 5), (9, 8, 7))]
    batch = Collator(task.config.rule)(rows)
    tokens, mask, where, columns = to_left_edge(
        batch["input_ids"], batch["attention_mask"], batch["labels"]
    )
    assert tokens.tolist()[0][:6] == [1, 2, 3, 4, 5, 7]
    assert tokens.tolist()[1][:4] == [6, 5, 9, 8]
    assert mask.tolist() == [[1] * 6 + [0] * (tokens.shape[1] - 6), [1] * 4 + [0] * 3]
    assert list(zip(where.tolist(), columns.tolist(), strict=True)) == [
        (0, 4),
        (0, 5),
        (1, 1),
        (1, 2),
        (1, 3),
    ]
    model = BaselineModel(task.loaded.model, task.loaded.model)
    alone = [model(**Collator(task.config.rule)([row]))["logits"] for row in rows]
    torch.testing.assert_close(model(**batch)["logits"], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_head_reads_the_last_prompt_token_once_and_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny_task(tmp_path)
    comparison = tiny_comparison(tmp_path, methods=("head_only",))
    config = training_config(
        arena_for(task), CONTENDERS["head_only"], {"learning_rate": 1e-1}, 0, comparison
    )
    collator = Collator(config.rule)
    with open_learner(CONTENDERS["head_only"], config, task) as learner:
        probe = learner.model
        rows = task.train.rows
        fit(probe, rows, task.valid.rows, config, collator, SilentProgress())
        chosen = probe.choose(rows, collator, batch_size=8)
        swapped = [TokenisedExample(row.prompt, rows[0].completion) for row in rows]
        assert probe.choose(swapped, collator, batch_size=3) == chosen
        state = task.loaded.model.base_model(torch.tensor([rows[0].prompt])).last_hidden_state
        normed = torch.nn.functional.layer_norm(state[0, -1], (state.shape[-1],))
        assert chosen[0] == probe.labels[int(probe.head(normed).argmax())]
    assert {row.prompt for row in rows} <= task.features.keys()
    with open_learner(CONTENDERS["head_only"], config, task) as learner:
        again = learner.model
        monkeypatch.setattr(again.base.base_model, "forward", None)
        fit(again, rows, task.valid.rows, config, collator, SilentProgress())
        assert torch.equal(again.head.weight, probe.head.weight)
