"""PEFT's LoRA on the query and value maps of every layer as a worker."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.loop import serve
from benchmarks.training.steps import LORA_RANK, Learner, Row, pad_right


class Lora(Learner):
    """Position rules mean nothing to it."""

    def read(self, model: str, dtype: str) -> dict[str, Any]:
        """See :class:`Learner`."""
        from transformers import AutoModelForCausalLM

        self._base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        return {name: version(name) for name in ("peft", "torch", "transformers")}

    def build(self, rule: str) -> Sequence[nn.Parameter]:
        """See :class:`Learner`."""
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"]
        config = LoraConfig(r=LORA_RANK, target_modules=targets, task_type="CAUSAL_LM")
        # Adapters in the model's own dtype are faster.
        self._model: Any = get_peft_model(self._base, config, autocast_adapter_dtype=False)
        self._model.train()
        return [p for p in self._model.parameters() if p.requires_grad]

    def collate(self, rows: Sequence[Row]) -> Any:
        """See :class:`Learner`."""
        return pad_right(rows)

    def loss(self, batch: Any) -> Tensor:
        """See :class:`Learner`."""
        loss: Tensor = self._model(**batch).loss
        return loss


if __name__ == "__main__":
    worker = Lora()
    serve({"load": worker.load, "epoch": worker.epoch})
