"""A causal language model's :class:`trainer.task.Task`: completions of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import set_seed

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.loading import LoadedModel, ModelKind
from reft_core.sites import ModelDescription
from reft_core.spec import TaskSpec
from trainer.collate import Collator
from trainer.config import TrainConfig
from trainer.data import Dataset, TokenisedExample, tokenise
from trainer.evaluation.scoring import score
from trainer.evaluation.splits import Evaluation, evaluate, likeliest_labels
from trainer.fit import mean_loss
from trainer.order import shuffled
from trainer.prefix import PrefixStore
from trainer.progress import Progress
from trainer.reft_model import ReftModel
from trainer.task import HeldOut, Measured, TrainedParts


@dataclass(frozen=True)
class CausalTask:
    """Completions of prompts that are edited. Implements :class:`trainer.task.Task`."""

    config: TrainConfig
    loaded: LoadedModel
    rows: Mapping[str, Sequence[TokenisedExample]]
    prefixes: PrefixStore | None = None
    """Keys and values that are the base's own, kept for every new model; None: each has its own."""
    kind: ModelKind = "causal"

    @classmethod
    def of(
        cls, config: TrainConfig, loaded: LoadedModel, datasets: Mapping[str, Dataset]
    ) -> CausalTask:
        """Every row fits the base's context behind the virtual tokens."""
        context = loaded.description.max_positions - config.num_virtual
        rows = {
            split: tokenise(
                dataset,
                loaded.tokenizer,
                config.rule,
                template=config.template,
                max_length=min(config.max_length or context, context),
            )
            for split, dataset in datasets.items()
        }
        return cls(config, loaded, rows)

    @property
    def collator(self) -> Collator:
        """Prompts end, and completions begin, in one column."""
        return Collator(self.config.rule)

    def new_model(self) -> ReftModel:
        """The base with untrained interventions, drawn from the seed."""
        set_seed(self.config.seed)
        return ReftModel(
            self.loaded.model,
            self.config.placement(self.loaded.description),
            num_units=self.config.rule.num_units,
            prefixes=self.prefixes or self.new_prefixes(),
            virtual=self.config.virtual_tokens(self.loaded),
        )

    def new_prefixes(self) -> PrefixStore:
        """An empty one, of the size in the config."""
        return PrefixStore(self.loaded.model, self.config.prefix_cache_mb * 2**20)

    def order(self, epoch: int) -> Sequence[int]:
        """Shuffled."""
        return shuffled(len(self.rows["train"]), self.config.seed)(epoch)

    def prompt_of(self, row: TokenisedExample) -> Sequence[int]:
        """All before the completion."""
        return row.prompt

    def measure(self, model: ReftModel, rows: Sequence[TokenisedExample]) -> Measured:
        """Mean loss over the rows' completion tokens."""
        return Measured(mean_loss(model, rows, self.config, self.collator))

    def parts(self, model: ReftModel) -> TrainedParts:
        """Edits and virtual tokens."""
        return parts_of(self.config, self.loaded.description, model)

    def probe(self, model: ReftModel, held_out: HeldOut, progress: Progress) -> dict[str, float]:
        """Of a labeller on the last split: right answers among the labels, with and without
        edits."""
        if self.config.labels is None:
            return {}
        dataset, rows = list(held_out.values())[-1]
        references = [example.completion for example in dataset.examples]
        found = {}
        for prefix, edited in (("", True), ("base_", False)):
            with progress.stage(f"likelihoods, {'adapter' if edited else 'base'}"):
                chosen = likeliest_labels(
                    model,
                    self.loaded.tokenizer,
                    rows,
                    self.config.labels,
                    self.collator,
                    batch_size=self.config.batch_size,
                    edited=edited,
                )
            found[f"{prefix}label_choice"] = score("exact_match", chosen, references)
        return found

    def evaluate(
        self, adapter: Adapter, held_out: HeldOut, progress: Progress
    ) -> dict[str, Evaluation]:
        """Each split's answers by base and adapter, from an engine of our own."""
        config, loaded = self.config, self.loaded
        all_rows = [row for _, rows in held_out.values() for row in rows]
        longest_answer = max(len(row.completion) for row in all_rows)
        max_tokens = config.max_new_tokens or longest_answer
        longest_prompt = max(len(row.prompt) for row in all_rows)
        longest_prompt += config.num_virtual
        context = loaded.description.max_positions
        max_tokens = min(max_tokens, context - longest_prompt)
        engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=longest_prompt + max_tokens))
        engine.start()
        try:
            engine.load_adapter(adapter)
            found = {}
            for split, (dataset, rows) in held_out.items():
                with progress.stage(f"answers, {split}"):
                    found[split] = evaluate(
                        engine,
                        loaded.tokenizer,
                        dataset,
                        rows,
                        adapter=adapter.digest,
                        metrics=config.metrics,
                        labels=config.labels,
                        max_tokens=max_tokens,
                    )
            return found
        finally:
            engine.stop()

    def with_settings(self, config: TrainConfig) -> CausalTask:
        """See :class:`trainer.task.Task`."""
        return replace(self, config=config)


def parts_of(config: TrainConfig, description: ModelDescription, model: ReftModel) -> TrainedParts:
    """Edits and virtual tokens of ``model``, trained as ``config`` says."""
    placement = config.placement(description)
    return TrainedParts(
        edits=model.to_edits(),
        task=TaskSpec(labels=config.labels),
        sites={} if placement is None else placement.site_specs(),
        prefix=model.to_prefix(),
        prefix_spec=None if model.virtual is None else model.virtual.spec(),
        template=config.template,
    )
