"""The obvious training step of this project's own edits as a worker."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.loop import serve
from benchmarks.training.own_worker import Reft
from benchmarks.training.steps import IGNORED, Row, pad_right
from reft_core.sites import edit_site, find_layers


class Naive(Reft):
    """The same edits by hooks on the padded batch, with a graph and logits everywhere."""

    def collate(self, rows: Sequence[Row]) -> Any:
        """See :class:`Learner`."""
        places = [(at, place) for at, row in enumerate(rows) for place in row["positions"]]
        return pad_right(rows), tuple(torch.tensor(places).T)

    def loss(self, batch: Any) -> Tensor:
        """See :class:`Learner`."""
        inputs, cells = batch
        base = self._loaded.model
        labels = inputs["labels"][:, 1:]
        with ExitStack() as stack:
            layers = find_layers(base)
            for key, edit in zip(self._model.keys, self._model.interventions, strict=True):

                def hook(hidden: Tensor, _x: Tensor, edit: nn.Module = edit) -> Tensor:
                    h = hidden[cells].float()  # (M, d)
                    return hidden.index_put(cells, (h + edit(h, h)).to(hidden.dtype))

                stack.callback(edit_site(layers[key.layer], key.site, hook).remove)
            asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            logits = base(**asked, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


if __name__ == "__main__":
    worker = Naive()
    serve({"load": worker.load, "epoch": worker.epoch})
