"""An encoder's :class:`trainer.task.Task`: labels, or values, of texts and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import set_seed

from reft_core.encoder import has_segments, longest_text
from reft_core.errors import TrainingError, explain
from reft_core.loading import LoadedModel, ModelKind
from reft_core.methods.virtual import VIRTUAL_METHODS
from reft_core.spec import TaskSpec
from trainer.classify.head import TrainableHead
from trainer.classify.measure import accuracy, matthews, pearson
from trainer.classify.model import ClassifierModel
from trainer.classify.rows import (
    LabelledText,
    TextCollator,
    TextRow,
    order_by_length,
    tokenise_texts,
)
from trainer.config import TrainConfig
from trainer.fit import batches
from trainer.task import Measured, TrainedParts


@dataclass(frozen=True)
class ClassifyTask:
    """Interventions and a head on an encoder. Implements :class:`trainer.task.Task`."""

    config: TrainConfig
    loaded: LoadedModel
    rows: Mapping[str, Sequence[TextRow]]
    labels: tuple[str, ...] | None
    """None: a regression."""
    model: ClassifierModel
    collator: TextCollator
    kind: ModelKind = "encoder"

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        loaded: LoadedModel,
        texts: Mapping[str, Sequence[LabelledText]],
    ) -> ClassifyTask:
        """The untrained task on ``texts`` by split; see :func:`trainer.task.task_for`.

        Labels are the config's, or those of the training rows in alphabetical order; with
        numbers for labels it is a regression.
        """
        if config.method in VIRTUAL_METHODS:
            expected = "one without virtual tokens: an encoder has no place for them"
            raise TrainingError(explain("method", config.method, expected), field="method")
        labels = config.labels or _labels(texts["train"])
        longest = longest_text(loaded.model, loaded.description)
        max_length = min(config.max_length or longest, longest)
        rows = {
            split: tokenise_texts(examples, loaded.tokenizer, config.rule, labels, max_length)
            for split, examples in texts.items()
        }
        collator = TextCollator(
            config.rule,
            regression=labels is None,
            segments=has_segments(loaded.model),
            pad_id=loaded.model.config.pad_token_id or 0,
        )
        targets = [row.target for row in rows["train"]]
        return cls(
            config, loaded, rows, labels, _untrained(config, loaded, labels, targets), collator
        )

    def order(self, epoch: int) -> list[int]:
        """Texts of like length in one batch."""
        lengths = [len(row.tokens) for row in self.rows["train"]]
        return order_by_length(lengths, self.config.batch_size, self.config.seed + epoch)

    @torch.no_grad()
    def measure(self, rows: Sequence[TextRow]) -> Measured:
        """Mean loss, and accuracy and Matthews correlation, or Pearson's of a regression."""
        outputs, targets = self.outputs(rows)
        loss = self.model.head.loss(outputs, targets).item()
        if self.labels is None:
            return Measured(loss, {"pearson": pearson(outputs[:, 0], targets)}, "pearson")
        said = outputs.argmax(1)
        metrics = {"accuracy": accuracy(said, targets), "matthews": matthews(said, targets)}
        return Measured(loss, metrics, "accuracy")

    @torch.no_grad()
    def outputs(self, rows: Sequence[TextRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits or values (n, L) of the model as it is, and targets (n,), in the rows' order."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].tokens))
        size, device = 4 * self.config.batch_size, self.model.device
        found, targets = [], []
        for batch in batches([rows[row] for row in order], size, self.collator, device):
            found.append(self.model(**batch)["logits"])
            targets.append(batch["labels"])
        self.model.train(was_training)
        places = torch.tensor(order, device=device).argsort()
        return torch.cat(found)[places], torch.cat(targets)[places]

    def parts(self) -> TrainedParts:
        """Edits, head and labels."""
        placement = self.config.placement(self.loaded.description)
        kind = "regression" if self.labels is None else "classification"
        return TrainedParts(
            edits=self.model.interventions.to_edits(),
            task=TaskSpec(kind=kind, labels=self.labels),
            sites={} if placement is None else placement.site_specs(),
            head=self.model.head.to_head(),
            head_spec=self.model.head.spec,
        )


def _labels(texts: Sequence[LabelledText]) -> tuple[str, ...] | None:
    """The labels of some rows in alphabetical order; None where numbers stand for them."""
    found = {text.label for text in texts}
    if all(isinstance(label, float) for label in found):
        return None
    return tuple(sorted(map(str, found)))


def _untrained(
    config: TrainConfig,
    loaded: LoadedModel,
    labels: Sequence[str] | None,
    targets: Sequence[float],
) -> ClassifierModel:
    """The encoder with interventions and a head drawn from the seed."""
    set_seed(config.seed)
    num_outputs = 1 if labels is None else len(labels)
    head = TrainableHead(
        config.head.spec,
        loaded.description.hidden_size,
        num_outputs,
        dropout=config.head.dropout,
    )
    head.start_from(targets, regression=labels is None)
    return ClassifierModel(
        loaded.model,
        config.placement(loaded.description),
        head,
        num_units=config.rule.num_units,
        head_learning_rate=config.head.learning_rate,
    )
