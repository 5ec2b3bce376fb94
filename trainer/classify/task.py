"""An encoder's :class:`trainer.task.Task`: labels, or values, of texts and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import set_seed

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse
from reft_core.classification import HeadedEncoder
from reft_core.encoder import EncoderRequest, has_segments, longest_text
from reft_core.errors import TrainingError, explain
from reft_core.loading import LoadedModel, ModelKind
from reft_core.methods.virtual import VIRTUAL_METHODS
from reft_core.spec import TaskSpec
from trainer.batches import batches
from trainer.classify.head import TrainableHead
from trainer.classify.model import ClassifierModel
from trainer.classify.rows import (
    TextCollator,
    TextRow,
    labelled,
    order_by_length,
    tokenise_texts,
)
from trainer.config import TrainConfig
from trainer.data import Dataset, Example
from trainer.evaluation.scoring import confusion, score
from trainer.evaluation.splits import Evaluation, Sample
from trainer.progress import Progress
from trainer.task import HeldOut, Measured, TrainedParts


@dataclass(frozen=True)
class ClassifyTask:
    """Interventions and a head on an encoder. Implements :class:`trainer.task.Task`."""

    config: TrainConfig
    loaded: LoadedModel
    rows: Mapping[str, Sequence[TextRow]]
    labels: tuple[str, ...] | None
    """None: a regression."""
    kind: ModelKind = "encoder"

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        loaded: LoadedModel,
        datasets: Mapping[str, Dataset],
    ) -> ClassifyTask:
        """See :func:`trainer.task.task_for`.

        Labels are the config's, or those of the training rows in alphabetical order; with
        numbers for labels it is a regression.
        """
        if config.method in VIRTUAL_METHODS:
            expected = "one without virtual tokens: an encoder has no place for them"
            raise TrainingError(explain("method", config.method, expected), field="method")
        labels = config.labels or _labels(datasets["train"].examples)
        if labels is not None and len(labels) < 2:
            path = datasets["train"].path
            raise TrainingError(f"{path}: every row has the label {labels[0]!r}", field="labels")
        longest = longest_text(loaded.model, loaded.description)
        max_length = min(config.max_length or longest, longest)
        rows = {
            split: tokenise_texts(
                dataset.examples, loaded.tokenizer, config.rule, labels, max_length
            )
            for split, dataset in datasets.items()
        }
        return cls(config, loaded, rows, labels)

    @property
    def collator(self) -> TextCollator:
        """Texts are padded on the right."""
        return TextCollator(
            self.config.rule,
            regression=self.labels is None,
            segments=has_segments(self.loaded.model),
            pad_id=self.loaded.model.config.pad_token_id or 0,
        )

    def new_model(self, tuned: Sequence[nn.Parameter] = ()) -> ClassifierModel:
        """The encoder with interventions and a head drawn from the seed.

        With ``tuned`` parameters of the encoder those are trained instead of interventions.
        """
        config, description = self.config, self.loaded.description
        set_seed(config.seed)
        head = TrainableHead(
            config.head.spec,
            description.hidden_size,
            1 if self.labels is None else len(self.labels),
            dropout=config.head.dropout,
        )
        targets = [row.target for row in self.rows["train"]]
        head.start_from(targets, regression=self.labels is None)
        return ClassifierModel(
            self.loaded.model,
            None if tuned else config.placement(description),
            head,
            num_units=config.rule.num_units,
            head_learning_rate=config.head.learning_rate,
            max_bytes=config.prefix_cache_mb * 2**20,
            tuned=tuned,
        )

    def order(self, epoch: int) -> list[int]:
        """Texts of like length in one batch."""
        lengths = [len(row.tokens) for row in self.rows["train"]]
        return order_by_length(lengths, self.config.batch_size, self.config.seed + epoch)

    def prompt_of(self, row: TextRow) -> Sequence[int]:
        """The text, or both of a pair."""
        return row.tokens

    @torch.no_grad()
    def measure(self, model: ClassifierModel, rows: Sequence[TextRow]) -> Measured:
        """Mean loss and metrics, the first of which chooses what training keeps."""
        outputs, targets = self.outputs(model, rows)
        metrics = self._metrics(self.said(outputs), self._said_right(targets))
        return Measured(model.head.loss(outputs, targets).item(), metrics, next(iter(metrics)))

    @torch.no_grad()
    def outputs(self, model: ClassifierModel, rows: Sequence[TextRow]) -> tuple[Tensor, Tensor]:
        """Logits or values (n, L) of the model as it is, and targets (n,), in the rows' order."""
        was_training = model.training
        model.eval()
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].tokens))
        size = 4 * self.config.batch_size
        found, targets = [], []
        for batch in batches([rows[row] for row in order], size, self.collator, model.device):
            found.append(model(**batch)["logits"])
            targets.append(batch["labels"])
        model.train(was_training)
        places = torch.tensor(order, device=model.device).argsort()
        return torch.cat(found)[places], torch.cat(targets)[places]

    def probe(
        self, model: ClassifierModel, held_out: HeldOut, progress: Progress
    ) -> dict[str, float]:
        """Nothing: a head says all when it is served."""
        return {}

    def evaluate(
        self, adapter: Adapter, held_out: HeldOut, progress: Progress
    ) -> dict[str, Evaluation]:
        """The served head's labels, or values, of each split. The base has none of its own."""
        served = HeadedEncoder(self.loaded)
        uses = (AdapterUse(adapter.to(self.loaded.model.device)),)
        found = {}
        for split, (dataset, rows) in held_out.items():
            with progress.stage(f"answers, {split}"):
                requests = [EncoderRequest(row.tokens, uses, row.segments) for row in rows]
                outputs = torch.stack(served.logits(requests))
            right = self._said_right(torch.tensor([row.target for row in rows]))
            found[split] = self._evaluation(dataset, self.said(outputs), right)
        return found

    def _evaluation(
        self, dataset: Dataset, answers: Sequence[str], references: Sequence[str]
    ) -> Evaluation:
        """Of a split's answers."""
        questions = [" / ".join(example.texts) for example in dataset.examples]
        samples = [
            Sample(question, reference, "", answer)
            for question, reference, answer in zip(questions, references, answers, strict=True)
        ]
        matrix = confusion(self.labels, answers, references) if self.labels else None
        return Evaluation(self._metrics(answers, references), matrix, tuple(samples))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of the config, if it names any; else accuracy and Matthews correlation, or of a
        regression Pearson's and Spearman's."""
        if self.config.changed("metrics"):
            return self.config.metrics
        return ("pearson", "spearman") if self.labels is None else ("accuracy", "matthews")

    def _metrics(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {name: score(name, answers, references) for name in self.metrics}

    def said(self, outputs: Tensor) -> list[str]:
        """The likeliest labels, or the values, of outputs (n, L)."""
        if self.labels is None:
            return [f"{value:.6f}" for value in outputs[:, 0].tolist()]
        return [self.labels[number] for number in outputs.argmax(1).tolist()]

    def _said_right(self, targets: Tensor) -> list[str]:
        """Targets (n,) as :meth:`said` writes them."""
        if self.labels is None:
            return [f"{value:.6f}" for value in targets.tolist()]
        return [self.labels[int(number)] for number in targets.tolist()]

    def parts(self, model: ClassifierModel) -> TrainedParts:
        """Edits, head and labels."""
        placement = model.placement
        kind = "regression" if self.labels is None else "classification"
        return TrainedParts(
            edits=model.interventions.to_edits(),
            task=TaskSpec(kind=kind, labels=self.labels),
            sites={} if placement is None else placement.site_specs(),
            head=model.head.to_head(),
            head_spec=model.head.spec,
        )

    def with_settings(self, config: TrainConfig) -> ClassifyTask:
        """See :class:`trainer.task.Task`."""
        return replace(self, config=config)


def _labels(examples: Sequence[Example]) -> tuple[str, ...] | None:
    """The labels of some rows in alphabetical order; None where numbers stand for them."""
    found = {labelled(example) for example in examples}
    if all(isinstance(label, float) for label in found):
        return None
    return tuple(sorted(map(str, found)))
