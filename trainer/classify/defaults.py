"""What a run on an encoder does where its config says nothing, and why.

The figures behind the choices are from runs on all-MiniLM-L6-v2: docs/training.md has them.
"""

from __future__ import annotations

from trainer.choosing import Choice, Chooser
from trainer.data.splits import Splits

_LEARNING_RATES = {"none": 2e-2}
_LEARNING_RATE = 2e-3
_HEAD_LEARNING_RATE = 5e-3
_LARGE = 512  # rows from which batches of 32 leave enough steps


def choose_for_encoder(chooser: Chooser, splits: Splits) -> None:
    """Labels, positions, rank, rates and batch size, from the rows alone."""
    config, train = chooser.config, splits.train.examples
    names = {example.label for example in train}
    if config.labels is None and any(isinstance(name, str) for name in names):
        labels = splits.labels or tuple(sorted(map(str, names)))
        chooser.choose("labels", labels, f"the {len(labels)} labels of the data", ", ".join(labels))
    if config.intervention is None:
        chooser.choose("learning_rate", _LEARNING_RATES["none"], "a head alone learns fast")
    else:
        chooser.choose("positions", "prompt", "the head reads the mean over all tokens")
        chooser.choose("rank", 16, "as many parameters as LoRA of rank 8 on queries and values")
        chooser.choose("learning_rate", _LEARNING_RATE, f"{config.method} on every token")
        if "learning_rate" not in config.head.model_fields_set:
            head = config.head.model_copy(update={"learning_rate": _HEAD_LEARNING_RATE})
            chooser.config = chooser.config.choosing(head=head)
            reason = "it starts further from its end"
            chooser.choices.append(Choice("head.learning_rate", _HEAD_LEARNING_RATE, reason))
    num_rows = len(train)
    size = 32 if num_rows >= _LARGE else 16 if num_rows >= 128 else 8
    parts = config.accumulate
    chooser.choose("batch_size", -(-size // parts) * parts, f"{num_rows} training rows")
