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

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_core.batch import EditPlan
from reft_core.edits import Edit
from reft_core.engine.attention import ForwardBatch
from reft_core.engine.linear import JoinedLinear, Linear, PackedLinear
from reft_core.engine.operations import HeadLayout, Operations
from reft_core.kernels import apply_edits
from reft_core.native.operations import NativeOperations
from reft_core.sites import find_layers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are known to be put together as below."""

_SITES = ("block_output", "attn_output", "mlp_output")


@dataclass(frozen=True)
class _Norm:
    """Root-mean-square norm over the last dimension."""

    weight: Tensor
    eps: float
    operations: Operations

    @classmethod
    def of(cls, module: Any, operations: Operations) -> _Norm:
        return cls(module.weight, module.variance_epsilon, operations)

    def __call__(self, x: Tensor) -> Tensor:
        return self.operations.rms_norm(x, self.weight, self.eps)


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, index: int, operations: Operations) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._operations = operations
        self._head_dim: int = attention.head_dim
        window: int | None = getattr(attention, "sliding_window", None)
        if window is None and attention.config.model_type == "mistral":
            window = attention.config.sliding_window
        self._layout = HeadLayout(
            layer=index,
            num_queries=attention.q_proj.out_features // self._head_dim,
            num_keys=attention.k_proj.out_features // self._head_dim,
            scale=attention.scaling,
            window=window,
        )
        self._before_attention = _Norm.of(layer.input_layernorm, operations)
        self._before_mlp = _Norm.of(layer.post_attention_layernorm, operations)
        self._head_norms: tuple[_Norm, _Norm] | None = None
        if hasattr(attention, "q_norm"):
            norms = (_Norm.of(norm, operations) for norm in (attention.q_norm, attention.k_norm))
            self._head_norms = next(norms), next(norms)
        self._qkv = operations.linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = operations.linear(attention.o_proj)
        self._gate_up = operations.linear(mlp.gate_proj, mlp.up_proj)
        self._down = operations.linear(mlp.down_proj)
        self._activation = None if _is_silu(mlp.act_fn) else mlp.act_fn

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(m.num_bytes for m in (self._qkv, self._out, self._gate_up, self._down))

    def __call__(
        self,
        h: Tensor,
        shape: tuple[int, int],
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        plan: EditPlan,
    ) -> Tensor:
        """What the layer puts out for h (N, d), the edits inside it included; h may be
        overwritten."""
        x = self._before_attention(h)
        attended = self._attend(x, shape, cos, sin, batch)
        h = self._added(h, self._out, attended, "attn_output", x, plan)
        x = self._before_mlp(h)
        return self._added(h, self._down, self._activated(x), "mlp_output", x, plan)

    def edit_output(self, h: Tensor, plan: EditPlan) -> Tensor:
        """What the layer puts out (N, d), changed in place by the edits of it."""
        return self._edited("block_output", h, h, plan)

    def _attend(
        self, x: Tensor, shape: tuple[int, int], cos: Tensor, sin: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """Attention (N, H·D) before the output projection."""
        heads = self._qkv(x).view(len(x), -1, self._head_dim)  # (N, H + 2·KH, D)
        if self._head_norms is not None:
            sizes = (self._layout.num_queries, self._layout.num_keys)
            for norm, part in zip(
                self._head_norms, heads.split((*sizes, sizes[1]), 1), strict=False
            ):
                part.copy_(norm(part))
        return self._operations.attend(heads, self._layout, cos, sin, batch, shape)

    def _activated(self, x: Tensor) -> Tensor:
        """act(gate) ∘ up (N, width) of the MLP."""
        gate_up = self._gate_up(x)
        if self._activation is None:
            return self._operations.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        product: Tensor = self._activation(gate).mul_(up)
        return product

    def _added(
        self, h: Tensor, linear: Linear, y: Tensor, site: str, x: Tensor, plan: EditPlan
    ) -> Tensor:
        """h plus the edited output of ``linear`` for y, all (N, ·); x is the site's input."""
        if (self._index, site) not in plan.places:
            return linear.plus(y, h)
        return h.add_(self._edited(site, linear(y), x, plan))

    def _edited(self, site: str, output: Tensor, x: Tensor, plan: EditPlan) -> Tensor:
        """A site's output (N, d), changed in place by its edits."""
        if edits := plan.places.get((self._index, site)):
            apply_edits(output, x, edits)
        return output


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
        self._norm = _Norm.of(inner.norm, self.operations)
        self._layers = [_Layer(layer, i, self.operations) for i, layer in enumerate(layers)]
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
        return site in _SITES and not (site == "block_output" and edit.source == "input")

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        batch: ForwardBatch,
        keep: Tensor | int,
        plan: EditPlan,
        branches: Sequence[Branch] = (),
    ) -> Tensor:
        """Logits (B, K, V) for tokens and positions (B, T), in the model's dtype.

        ``keep`` selects the K of T columns whose logits are wanted: indices, the last so many,
        or 0 for all. With ``branches``, in ascending order of stage, B is 1 and T becomes the
        number of rows of the last one.
        """
        num_rows, num_columns = tokens.shape
        hidden = self._embed(tokens)  # (B, T, d), a fresh tensor
        dtype = self.operations.angle_dtype or hidden.dtype
        angles = self._rotary(hidden.new_empty(0, dtype=dtype), positions)
        cos, sin = (angle.flatten(0, 1).contiguous() for angle in angles)  # (N, D)
        h = hidden.flatten(0, 1)
        at_stage = {branch.stage: branch for branch in branches}
        for stage, layer in enumerate(self._layers, 1):
            h = layer(h, (num_rows, num_columns), cos, sin, batch, plan)
            if (branch := at_stage.get(stage)) is not None:
                h, cos, sin = (tensor.index_select(0, branch.rows) for tensor in (h, cos, sin))
                num_columns, batch, plan = len(h), branch.batch, branch.plan
            h = layer.edit_output(h, plan)
        columns = keep if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
        kept = h.unflatten(0, (num_rows, num_columns))[:, columns]
        return self._head(self._norm(kept.flatten(0, 1))).unflatten(0, kept.shape[:2])


def _is_silu(activation: nn.Module) -> bool:
    """Whether an activation is x·sigmoid(x), by whatever class."""
    probe = torch.linspace(-4, 4, 9)
    return torch.equal(activation(probe), nn.functional.silu(probe))
