"""Comparisons on an encoder-decoder: the answers that are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from reft_core.adapter import Adapter
from trainer.compare import serving
from trainer.compare.answers import Answers
from trainer.compare.arena import Arena
from trainer.compare.contenders import Contender
from trainer.compare.learners import Saved
from trainer.compare.serving import Seq2SeqWorkload, Serving, Workload
from trainer.compare.task import Split
from trainer.config import TrainConfig
from trainer.evaluation.scoring import METRICS, Metric
from trainer.outcome import FitResult
from trainer.seq2seq.task import Seq2SeqTask, placement_of


@dataclass(frozen=True)
class Seq2SeqArena(Arena):
    """Implements :class:`Arena`."""

    @property
    @override
    def metric(self) -> Metric:
        """The config's first, of greedy answers."""
        return METRICS[self.task.config.metrics[0]]

    @override
    def why_not(self, contender: Contender) -> str | None:
        if contender.name == "few_shot":
            return "an encoder-decoder reads one prompt and knows no turns before it"
        if contender.kind == "head":
            return "an encoder-decoder is trained by what its decoder writes"
        if contender.size == "prefix_length":
            return "virtual tokens have no place in an encoder-decoder here"
        return None

    @override
    def check(self, config: TrainConfig) -> None:
        placement_of(config, self.task.loaded)

    @override
    def validated(self, model: Any, config: TrainConfig, result: FitResult) -> dict[str, float]:
        return {"loss": result.best.valid_loss}

    @override
    def asked(self, model: Any, config: TrainConfig, test: Split) -> Answers:
        """Of the base, which is as the model has made it."""
        return self._answers(test)

    @override
    def serves(self, saved: Saved) -> bool:
        return saved.adapter is not None

    @override
    def served(self, saved: Saved, test: Split) -> Answers:
        return self._answers(test, saved.adapter)

    @override
    def cost(self, contender: Contender, saved: Saved, num_trained: int, test: Split) -> Serving:
        work = self._work(test)
        if saved.adapter is not None:
            return serving.of_adapter(work, saved.adapter)
        if saved.num_by_side is not None:
            return serving.of_both_sides(work, *saved.num_by_side)
        return serving.own_weights()

    @override
    def prompted(self, shots: int, seed: int, test: Split) -> tuple[Answers, Serving]:
        return self._answers(test), serving.none()

    def _answers(self, test: Split, adapter: Adapter | None = None) -> Answers:
        shared = self.task.shared
        assert isinstance(shared, Seq2SeqTask)
        return Answers(texts=tuple(shared.answers(test.rows, adapter)))

    def _work(self, test: Split) -> Workload:
        return Seq2SeqWorkload.on(self.task.loaded, test.rows)
