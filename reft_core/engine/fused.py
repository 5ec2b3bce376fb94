"""The forward of Llama-like models, with fewer and faster operations.

Computes what transformers' code computes, over weights laid out for the kernels that read them: one
product for query, key and value, one for gate and up. Products and what lies between them are done
by compiled loops (:mod:`reft_core.native`) where this machine can compile them, else by oneDNN and
torch. It serves the forwards whose edits act at the sites it passes by; the runner gives all
others to transformers' code, and compares the two when it starts. The packed weights are a second
copy of the model's; on a GPU nothing is packed, and the joined weights are the model's own storage.

Letters: B sequences, T new tokens of each, N = B·T, H query heads, KH key-value heads, D head
size, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_core.batch import EditPlan
from reft_core.edits import Edit
from reft_core.engine.attention import ForwardBatch
from reft_core.engine.layer import Layer, Norm
from reft_core.engine.linear import JoinedLinear, Linear, PackedLinear
from reft_core.engine.operations import Operations
from reft_core.native.operations import NativeOperations
from reft_core.sites import find_layers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are known to be put together as below."""

_OUTPUT, _INSIDE = "block_output", ("attn_output", "mlp_output")
"""Sites of a layer that the forward passes by."""


@dataclass(frozen=True)
class Branch:
    """Other rows, from one stage of a forward on: between a layer and the edits of its output."""

    stage: int
    """Layers computed before."""
    rows: Tensor
    """(N',) int64: the row that each of the N' new ones goes on from."""
    batch: ForwardBatch
    plan: EditPlan


class FusedForward:
    """See the module. Weights are packed on construction."""

    def __init__(self, model: PreTrainedModel, *, native: bool = True) -> None:
        inner: Any = model.get_decoder()
        self._embed: nn.Embedding = inner.embed_tokens
        self._rotary = inner.rotary_emb
        layers = find_layers(model)
        first: Any = layers[0]
        self.operations = Operations()
        if native and model.device.type == "cpu":
            self.operations = (
                NativeOperations.where_available(model.dtype, first.self_attn.head_dim)
                or self.operations
            )
        self._norm = Norm.of(inner.norm, self.operations)
        self._layers = [Layer(layer, i, self.operations) for i, layer in enumerate(layers)]
        self._at_once = self.operations.whole_layers(self._layers)
        head: Any = model.get_output_embeddings()
        self._head: Linear = self.operations.linear(head)
        self.num_bytes = self._head.num_bytes + sum(layer.num_bytes for layer in self._layers)

    @staticmethod
    def is_for(model: PreTrainedModel) -> bool:
        """Whether this machine and this model have what the forward needs."""
        parameter = next(model.parameters())
        if model.config.model_type not in FAMILIES:
            return False
        if parameter.device.type == "cuda":
            return JoinedLinear.serves(model)
        if parameter.device.type != "cpu":
            return False
        linears = [type(module) for module in model.modules() if isinstance(module, nn.Linear)]
        return PackedLinear.serves(parameter.dtype) and set(linears) == {nn.Linear}

    @staticmethod
    def can_edit(plan: EditPlan) -> bool:
        """Whether all edits of a plan act where this forward passes by."""
        return all(
            FusedForward.passes_by(site, row_edit.edit)
            for (_, site), edits in plan.places.items()
            for row_edit in edits
        )

    @staticmethod
    def passes_by(site: str, edit: Edit) -> bool:
        """Whether an edit acts where this forward passes by, on what it has there."""
        return site in _INSIDE or (site == _OUTPUT and edit.source != "input")

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        batch: ForwardBatch,
        keep: Tensor | int,
        plan: EditPlan,
        branches: Sequence[Branch] = (),
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K, V) for tokens and positions (B, T), in the model's dtype.

        ``keep`` selects the K of T columns whose logits are wanted: indices, the last so many,
        or 0 for all. With ``branches``, in ascending order of stage, B is 1 and T becomes the
        number of rows of the last one. With ``rows`` (R,), ascending, B is 1 and T becomes R in
        the last layer, as soon as its keys and values are stored; ``keep`` and the plan's places
        in that layer count those.
        """
        num_rows, num_columns = tokens.shape
        hidden = self._embed(tokens)  # (B, T, d), a fresh tensor
        dtype = self.operations.angle_dtype or hidden.dtype
        angles = self._rotary(hidden.new_empty(0, dtype=dtype), positions)
        cos, sin = (angle.flatten(0, 1).contiguous() for angle in angles)  # (N, D)
        h = hidden.flatten(0, 1)
        at_stage = {branch.stage: branch for branch in branches}
        first = 0
        for last in self._stops(plan, branches):
            only = rows if last == len(self._layers) else None
            shape = num_rows, num_columns
            h = self._through(first, last, h, shape, (cos, sin), batch, plan, only)
            num_columns = len(h) // num_rows
            if (branch := at_stage.get(last)) is not None:
                h, cos, sin = (tensor.index_select(0, branch.rows) for tensor in (h, cos, sin))
                num_columns, batch, plan = len(h), branch.batch, branch.plan
            h = self._layers[last - 1].edit_output(h, plan)
            first = last
        columns = keep if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
        kept = h.unflatten(0, (num_rows, num_columns))[:, columns]
        return self._head(self._norm(kept.flatten(0, 1))).unflatten(0, kept.shape[:2])

    def _stops(self, plan: EditPlan, branches: Sequence[Branch]) -> list[int]:
        """Layers after which something else has its turn, and on both sides of those with edits
        inside; ascending, all layers last."""
        stops = {len(self._layers), *(branch.stage for branch in branches)}
        for each in (plan, *(branch.plan for branch in branches)):
            for layer, site in each.places:
                stops.add(layer + 1)
                if site != _OUTPUT and layer > 0:
                    stops.add(layer)
        return sorted(stops)

    def _through(
        self,
        first: int,
        last: int,
        h: Tensor,
        shape: tuple[int, int],
        angles: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        plan: EditPlan,
        rows: Tensor | None,
    ) -> Tensor:
        """What layers ``first`` to ``last - 1`` put out (N, d), but for edits of the last one's
        output; h may be overwritten. The last one goes on with ``rows`` alone, if given."""
        cos, sin = angles
        has_edits_inside = any((first, site) in plan.places for site in _INSIDE)
        if self._at_once is not None and not has_edits_inside:
            return self._at_once(first, last, h, cos, sin, batch, rows)
        for layer in self._layers[first:last]:
            only = rows if layer is self._layers[last - 1] else None
            h = layer(h, shape, cos, sin, batch, plan, only)
        return h
