"""An encoder-decoder's :class:`trainer.task.Task`: answers of the decoder to edited prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import set_seed

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse
from reft_core.encoder import EncoderRequest, longest_text
from reft_core.errors import TrainingError, explain
from reft_core.loading import LoadedModel, ModelKind
from reft_core.methods.placement import Placement
from reft_core.seq2seq import Seq2SeqGenerator
from reft_core.spec import TaskSpec
from trainer.config import TrainConfig
from trainer.data import Dataset, TokenisedExample
from trainer.data.templates import PLAIN_TEMPLATE
from trainer.evaluation.splits import Evaluation, evaluation_of
from trainer.fit import mean_loss
from trainer.order import shuffled
from trainer.progress import Progress
from trainer.seq2seq.model import Seq2SeqModel
from trainer.seq2seq.rows import Seq2SeqCollator, tokenise_seq2seq
from trainer.task import HeldOut, Measured, TrainedParts


@dataclass(frozen=True)
class Seq2SeqTask:
    """Interventions on the encoder. Implements :class:`trainer.task.Task`."""

    config: TrainConfig
    loaded: LoadedModel
    rows: Mapping[str, Sequence[TokenisedExample]]
    kind: ModelKind = "seq2seq"

    @classmethod
    def of(
        cls, config: TrainConfig, loaded: LoadedModel, datasets: Mapping[str, Dataset]
    ) -> Seq2SeqTask:
        """See :func:`trainer.task.task_for`."""
        placement_of(config, loaded)  # says what is wrong with it
        longest = longest_text(loaded.model.get_encoder(), loaded.description)
        rows = {
            split: tokenise_seq2seq(
                dataset.examples,
                loaded.tokenizer,
                config.rule,
                template=config.template or PLAIN_TEMPLATE,
                max_length=min(config.max_length or longest, longest),
            )
            for split, dataset in datasets.items()
        }
        return cls(config, loaded, rows)

    @property
    def collator(self) -> Seq2SeqCollator:
        """Prompts and answers are padded on the right."""
        return Seq2SeqCollator(self.config.rule, self.loaded.model.config.pad_token_id or 0)

    @property
    def placement(self) -> Placement:
        """The method on the encoder's layers."""
        return placement_of(self.config, self.loaded)

    def new_model(self, tuned: Sequence[nn.Parameter] = ()) -> Seq2SeqModel:
        """The base with untrained interventions on its encoder, drawn from the seed.

        With ``tuned`` parameters of the base those are trained instead.
        """
        set_seed(self.config.seed)
        return Seq2SeqModel(
            self.loaded.model,
            None if tuned else self.placement,
            num_units=self.config.rule.num_units,
            tuned=tuned,
        )

    def order(self, epoch: int) -> Sequence[int]:
        """Shuffled."""
        return shuffled(len(self.rows["train"]), self.config.seed)(epoch)

    def prompt_of(self, row: TokenisedExample) -> Sequence[int]:
        """What the encoder reads."""
        return row.prompt

    def measure(self, model: Seq2SeqModel, rows: Sequence[TokenisedExample]) -> Measured:
        """Mean loss over the rows' target tokens."""
        return Measured(mean_loss(model, rows, self.config, self.collator))

    def parts(self, model: Seq2SeqModel) -> TrainedParts:
        """The edits, and the template of prompts."""
        return TrainedParts(
            edits=model.interventions.to_edits(),
            task=TaskSpec(labels=self.config.labels),
            sites=self.placement.site_specs(),
            template=self.config.template or PLAIN_TEMPLATE,
        )

    def probe(self, model: Seq2SeqModel, held_out: HeldOut, progress: Progress) -> dict[str, float]:
        """Nothing."""
        return {}

    def evaluate(
        self, adapter: Adapter, held_out: HeldOut, progress: Progress
    ) -> dict[str, Evaluation]:
        """Each split's greedy answers by base and adapter."""
        found = {}
        for split, (dataset, rows) in held_out.items():
            with progress.stage(f"answers, {split}"):
                base, edited = self.answers(rows), self.answers(rows, adapter)
            found[split] = evaluation_of(
                dataset, base, edited, self.config.metrics, self.config.labels
            )
        return found

    def answers(
        self, rows: Sequence[TokenisedExample], adapter: Adapter | None = None
    ) -> list[str]:
        """Greedy answers to the rows' prompts by the base as it is, with ``adapter`` if any."""
        uses = () if adapter is None else (AdapterUse(adapter.to(self.loaded.model.device)),)
        requests = [EncoderRequest(row.prompt, uses) for row in rows]
        longest = max(len(row.completion) for row in rows)
        max_tokens = self.config.max_new_tokens or longest
        decode = self.loaded.tokenizer.decode
        return [
            decode(tokens, skip_special_tokens=True)
            for tokens in Seq2SeqGenerator(self.loaded).generate(requests, max_tokens)
        ]

    def with_settings(self, config: TrainConfig) -> Seq2SeqTask:
        """See :class:`trainer.task.Task`."""
        return replace(self, config=config)


def placement_of(config: TrainConfig, loaded: LoadedModel) -> Placement:
    """The method on the encoder's layers, at prompt positions: nothing edits the decoder."""
    placement = config.placement(loaded.description)
    if placement is None:
        expected = "one that edits states, which is what an encoder-decoder's encoder takes"
        raise TrainingError(explain("method", config.method, expected), field="method")
    if config.phase == "all":
        expected = "'prompt': the decoder is not edited"
        raise TrainingError(explain("phase", config.phase, expected), field="phase")
    return replace(placement, phase="prompt")
