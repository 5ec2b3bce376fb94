"""This project's training step as a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.peers.loop import serve
from benchmarks.training.steps import RANK, Learner, Row
from reft_core.loading import LoadedModel, load_model
from reft_core.methods.placement import Placement
from reft_core.positions import PositionRule
from trainer.collate import Collator
from trainer.data import TokenisedExample
from trainer.prefix import PrefixStore
from trainer.reft_model import ReftModel

_PREFIX_BYTES = 4 << 30


class Reft(Learner):
    """LoReFT in every layer, as the trainer runs it."""

    _loaded: LoadedModel
    _model: ReftModel

    def read(self, model: str, dtype: str) -> dict[str, Any]:
        """See :class:`Learner`."""
        self._loaded = load_model(model, dtype=dtype)  # type: ignore[arg-type]
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def build(self, rule: str) -> Sequence[nn.Parameter]:
        """See :class:`Learner`."""
        self._collator = Collator(PositionRule.parse(rule))
        description = self._loaded.description
        layers = tuple(range(description.num_layers))
        self._model = ReftModel(
            self._loaded.model,
            Placement.on(description, "loreft", layers=layers, rank=RANK),
            num_units=1,
            prefixes=PrefixStore(self._loaded.model, _PREFIX_BYTES),
        )
        return self._model.train().trainable()

    def collate(self, rows: Sequence[Row]) -> Any:
        """See :class:`Learner`."""
        return self._collator(
            [TokenisedExample(tuple(row["prompt"]), tuple(row["completion"])) for row in rows]
        )

    def loss(self, batch: Any) -> Tensor:
        """See :class:`Learner`."""
        loss: Tensor = self._model(**batch)["loss"]
        return loss


if __name__ == "__main__":
    worker = Reft()
    serve({"load": worker.load, "epoch": worker.epoch})
