"""What a run does where its config says nothing, and why.

They are judgements from development runs on SmolLM2-135M, no tuned optimum: see `reft sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reft_core.errors import TrainingError
from reft_core.loading import ModelKind
from trainer.choosing import Choice, Chooser
from trainer.classify.defaults import choose_for_encoder
from trainer.config import TrainConfig
from trainer.data.examples import Dataset
from trainer.data.splits import Splits
from trainer.data.templates import LABEL_TEMPLATE, PLAIN_TEMPLATE, label_lead

STEPS = 150
"""Enough for a labeller of six classes; more are taken only where there are more labels."""

_STEPS_PER_LABEL = 10
_MOST_STEPS = 600
_MOST_EPOCHS = 12
_FEWEST_STEPS = 100
_MOST_LABELS_GUESSED = 32
_FEW_LABELS = 8
_DEEP = 12
_VALID_ROWS = 500
_EVAL_ROWS = 2_000
_EVAL_TOKENS = 16_000
_EXTRA_TOKENS = 8  # that an answer may be longer than the longest reference
_LEARNING_RATES = {"lora": 1e-3, "series_adapter": 1e-3, "parallel_adapter": 1e-3}
_SHORT = 16


def choose_from_data(config: TrainConfig, splits: Splits, kind: ModelKind = "causal") -> Chooser:
    """Choices that need the rows and the kind of base alone.

    Raises :class:`TrainingError` for scores as labels of a base that writes its answers.
    """
    chooser = Chooser(config)
    chooser.choose("name", config.name, "after the data")
    if kind == "encoder":
        choose_for_encoder(chooser, splits)
        return chooser
    if kind == "seq2seq":
        chooser.choose("positions", "prompt", "an encoder reads all of the prompt at once")
    train = splits.train.examples
    if train[0].kind == "label":
        chooser.choose(
            "template", LABEL_TEMPLATE, "rows have a text and a label", _shown(LABEL_TEMPLATE)
        )
    _choose_labels(chooser, splits)
    _choose_size(chooser, splits.train)
    return chooser


def _choose_labels(chooser: Chooser, splits: Splits) -> None:
    """The answers of a labeller: named, or those that occur."""
    train = splits.train.examples
    if train[0].kind == "label":
        template = chooser.config.template or LABEL_TEMPLATE
        if score := next((e for e in train if isinstance(e.label, float)), None):
            raise TrainingError(
                f"{score.where}: label is {score.label}, expected a class; a causal model gives "
                "no scores",
                field="label",
            )
        names = splits.labels or tuple(sorted({str(example.label) for example in train}))
        labels = tuple(f"{label_lead(template)}{name.strip()}" for name in names)
        if len(labels) < 2:
            raise TrainingError(f"{splits.train.path}: every row has the label {labels[0]!r}")
        _check_known(splits, names)
        if chooser.config.labels is not None:
            chooser.config = chooser.config.choosing(labels=labels)
        chooser.choose("labels", labels, f"the {len(labels)} labels of the data", ", ".join(names))
        return
    answers = {example.completion for example in train}
    every = [example for dataset in splits.datasets.values() for example in dataset.examples]
    recur = 2 <= len(answers) <= _MOST_LABELS_GUESSED and len(every) >= 4 * len(answers)
    if recur and all(example.completion in answers for example in every):
        chooser.choose(
            "labels",
            tuple(sorted(answers)),
            f"all {len(every)} completions are one of these {len(answers)}",
            ", ".join(sorted(answer.strip() for answer in answers)),
        )


def _check_known(splits: Splits, names: Sequence[str]) -> None:
    """Raise :class:`TrainingError` for a row that is evaluated by a label that is not learnt."""
    known = {name.strip() for name in names}
    for example in (e for dataset in splits.datasets.values() for e in dataset.examples):
        if example.kind == "label" and str(example.label) not in known:
            raise TrainingError(
                f"{example.where}: label {example.label!r} has no training row; the labels are "
                f"{', '.join(names)}",
                field="label",
            )


def _choose_size(chooser: Chooser, train: Dataset) -> None:
    """Method, positions, rank and learning rate."""
    config = chooser.config
    few = config.labels is not None and len(config.labels) <= _FEW_LABELS
    virtual = config.num_virtual > 0
    if not virtual:
        chooser.choose(
            "positions",
            "l1",
            "the last prompt token; what precedes it stays the base's, so it is computed once",
        )
    if config.intervention is not None:
        if few:
            chooser.choose("rank", 1, f"{len(config.labels or ())} labels need no more")
        else:
            chooser.choose("rank", 4, "answers are many or long")
    rate = _LEARNING_RATES.get(config.method, 8e-3 if chooser.config.rank == 1 else 4e-3)
    chooser.choose("learning_rate", rate, f"{config.method} at rank {chooser.config.rank}")
    num_rows = len(train.examples)
    size = 16 if num_rows >= 128 else 8 if num_rows >= 48 else 4
    parts = config.accumulate
    chooser.choose("batch_size", -(-size // parts) * parts, f"{num_rows} training rows")


def choose_from_model(
    chooser: Chooser,
    num_layers: int,
    tokenizer: PreTrainedTokenizerBase,
    kind: ModelKind = "causal",
) -> None:
    """Choices that need the base model."""
    config = chooser.config
    if kind == "encoder":
        if config.intervention is not None:
            chooser.choose("layers", "all", f"the {num_layers} of the base")
        return
    if config.intervention is not None and num_layers >= _DEEP and config.rank == 1:
        chooser.choose("layers", "every:3", f"every third of {num_layers}, with few labels")
    elif config.intervention is not None:
        chooser.choose("layers", "all", f"the {num_layers} of the base")
    if config.template is None and not tokenizer.chat_template:
        chooser.choose(
            "template", PLAIN_TEMPLATE, "the base has no chat template", _shown(PLAIN_TEMPLATE)
        )


def choose_dtype(chooser: Chooser) -> None:
    """The base's dtype, where time is short and bfloat16 is fast."""
    if not chooser.config.sized and _fast_bfloat16():
        chooser.choose("dtype", "bfloat16", "this machine multiplies it faster; edits are float32")


def choose_evaluation(
    chooser: Chooser, rows: Mapping[str, Sequence[Any]], kind: ModelKind = "causal"
) -> None:
    """Choices that need the rows' tokens: how much is measured, and how.

    A head's answer is one forward of a batch, so that all of them are measured.
    """
    if kind == "encoder":
        return
    held_out = [row for name, part in rows.items() if name != "train" for row in part]
    longest = max(len(row.completion) for row in held_out)
    chooser.choose(
        "max_new_tokens",
        longest + _EXTRA_TOKENS,
        f"{_EXTRA_TOKENS} more than the longest reference answer",
    )
    if len(rows["valid"]) > _VALID_ROWS:
        chooser.choose("valid_rows", _VALID_ROWS, f"of {len(rows['valid'])}, while training")
    config = chooser.config
    each = max(len(row.completion) for row in held_out) * len(config.labels or (0,))
    most = max(min(_EVAL_ROWS, _EVAL_TOKENS // each), 32)
    largest = max(len(part) for name, part in rows.items() if name != "train")
    if largest > most:
        chooser.choose("eval_rows", most, f"of {largest}, to be done in about a minute")


def choose_steps(
    chooser: Chooser,
    num_rows: int,
    seconds_for: Callable[[int], float],
    kind: ModelKind = "causal",
) -> None:
    """How long to train: ``seconds_for`` says how long some steps would take here."""
    config = chooser.config
    if config.sized:
        return
    per_epoch = -(-num_rows // config.batch_size)
    least = STEPS if kind == "causal" else 2 * STEPS  # cheaper ones, of texts without a trigger
    wanted = min(max(least, _STEPS_PER_LABEL * len(config.labels or ())), _MOST_STEPS)
    steps = min(wanted, _MOST_EPOCHS * per_epoch)
    reason = f"{steps / per_epoch:.1f} times through {num_rows} rows"
    needed = seconds_for(steps)
    if needed > config.budget_seconds and steps > _FEWEST_STEPS:
        fewer = max(int(steps * config.budget_seconds / needed) // 10 * 10, _FEWEST_STEPS)
        reason = (
            f"{steps} would take about {needed:.0f} s here, and budget_seconds is "
            f"{config.budget_seconds:g}"
        )
        steps = fewer
    chooser.choose("steps", steps, reason)


def _fast_bfloat16() -> bool:
    """Whether this machine has instructions for bfloat16."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _shown(template: Any) -> str:
    return repr(f"{template.user}{template.generation}")


__all__ = [
    "Choice",
    "Chooser",
    "choose_dtype",
    "choose_evaluation",
    "choose_from_data",
    "choose_from_model",
    "choose_steps",
]
