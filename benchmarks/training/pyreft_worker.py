"""pyreft 0.1.0 as a worker, called as its ReftTrainer calls it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.loop import serve
from benchmarks.training.steps import RANK, Learner, Row, pad_right


class Pyreft(Learner):
    """LoReFT in every layer; one set of parameters for all positions."""

    def read(self, model: str, dtype: str) -> dict[str, Any]:
        """See :class:`Learner`. Its transformers is older than the one that wrote the config."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = json.loads((Path(model) / "config.json").read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config.pop("dtype", None)
        self._dtype = getattr(torch, dtype)
        self._base = LlamaForCausalLM.from_pretrained(
            model, config=LlamaConfig(**config), torch_dtype=self._dtype
        )
        packages = ("pyreft", "pyvene", "torch", "transformers")
        return {name: version(name) for name in packages}

    def build(self, rule: str) -> Sequence[nn.Parameter]:
        """See :class:`Learner`."""
        pyreft: Any = import_module("pyreft")  # of an environment that type checks do not see
        self._num_layers = self._base.config.num_hidden_layers
        representations = [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=self._base.config.hidden_size,
                    low_rank_dimension=RANK,
                    dtype=self._dtype,
                ),
            }
            for layer in range(self._num_layers)
        ]
        config = pyreft.ReftConfig(representations=representations)
        self._model = pyreft.get_reft_model(self._base, config)
        self._model.train()
        return [p for p in self._model.parameters() if p.requires_grad]

    def collate(self, rows: Sequence[Row]) -> Any:
        """See :class:`Learner`."""
        places = [row["positions"] for row in rows]
        return pad_right(rows), [places] * self._num_layers

    def loss(self, batch: Any) -> Tensor:
        """See :class:`Learner`."""
        inputs, places = batch
        labels = inputs["labels"]
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        where = {"sources->base": (None, places)}
        _, output = self._model(asked, unit_locations=where, labels=labels, subspaces=None)
        loss: Tensor = output.loss
        return loss


if __name__ == "__main__":
    worker = Pyreft()
    serve({"load": worker.load, "epoch": worker.epoch})
