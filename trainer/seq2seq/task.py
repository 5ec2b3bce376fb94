"""An encoder-decoder's :class:`trainer.task.Task`: answers of the decoder to edited prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import set_seed

from reft_core.encoder import longest_text
from reft_core.errors import TrainingError, explain
from reft_core.loading import LoadedModel, ModelKind
from reft_core.methods.placement import Placement
from reft_core.spec import TaskSpec
from trainer.config import TrainConfig
from trainer.data import Example, TokenisedExample
from trainer.fit import mean_loss
from trainer.seq2seq.model import Seq2SeqModel
from trainer.seq2seq.rows import PLAIN, Seq2SeqCollator, tokenise_seq2seq
from trainer.task import Measured, TrainedParts


@dataclass(frozen=True)
class Seq2SeqTask:
    """Interventions on the encoder. Implements :class:`trainer.task.Task`."""

    config: TrainConfig
    loaded: LoadedModel
    rows: Mapping[str, Sequence[TokenisedExample]]
    model: Seq2SeqModel
    collator: Seq2SeqCollator
    placement: Placement
    kind: ModelKind = "seq2seq"

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        loaded: LoadedModel,
        examples: Mapping[str, Sequence[Example]],
    ) -> Seq2SeqTask:
        """The untrained task on ``examples`` by split; see :func:`trainer.task.task_for`."""
        placement = _placement(config, loaded)
        longest = longest_text(loaded.model.get_encoder(), loaded.description)
        rows = {
            split: tokenise_seq2seq(
                some,
                loaded.tokenizer,
                config.rule,
                template=config.template,
                max_length=min(config.max_length or longest, longest),
            )
            for split, some in examples.items()
        }
        set_seed(config.seed)
        model = Seq2SeqModel(loaded.model, placement, num_units=config.rule.num_units)
        collator = Seq2SeqCollator(config.rule, loaded.model.config.pad_token_id or 0)
        return cls(config, loaded, rows, model, collator, placement)

    def order(self, epoch: int) -> list[int]:
        """Shuffled."""
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        return torch.randperm(len(self.rows["train"]), generator=generator).tolist()

    def measure(self, rows: Sequence[TokenisedExample]) -> Measured:
        """Mean loss over the rows' target tokens."""
        return Measured(mean_loss(self.model, rows, self.config, self.collator))

    def parts(self) -> TrainedParts:
        """The edits, and the template of prompts."""
        return TrainedParts(
            edits=self.model.interventions.to_edits(),
            task=TaskSpec(labels=self.config.labels),
            sites=self.placement.site_specs(),
            template=self.config.template or PLAIN,
        )


def _placement(config: TrainConfig, loaded: LoadedModel) -> Placement:
    """The method on the encoder's layers, at prompt positions: nothing edits the decoder."""
    placement = config.placement(loaded.description)
    if placement is None:
        expected = "one that edits states, which is what an encoder-decoder's encoder takes"
        raise TrainingError(explain("method", config.method, expected), field="method")
    if config.phase == "all":
        expected = "'prompt': the decoder is not edited"
        raise TrainingError(explain("phase", config.phase, expected), field="phase")
    return replace(placement, phase="prompt")
