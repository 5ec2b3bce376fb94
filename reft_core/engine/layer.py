"""One decoder layer of a Llama-like model, in the operations of the fused forward.

Letters: B sequences, T new tokens of each, N = B·T, H query heads, KH key-value heads, D head
size, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_core.batch import EditPlan
from reft_core.engine.attention import ForwardBatch
from reft_core.engine.linear import Linear
from reft_core.engine.operations import HeadLayout, Operations
from reft_core.kernels import apply_edits


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm over the last dimension."""

    weight: Tensor
    eps: float
    operations: Operations

    @classmethod
    def of(cls, module: Any, operations: Operations) -> Norm:
        """That of a module of transformers."""
        return cls(module.weight, module.variance_epsilon, operations)

    def __call__(self, x: Tensor) -> Tensor:
        """The normed x, of the same shape."""
        return self.operations.rms_norm(x, self.weight, self.eps)


class Layer:
    """See the module. Weights are packed on construction, from a layer of transformers."""

    def __init__(self, layer: Any, index: int, operations: Operations) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._operations = operations
        self.head_dim: int = attention.head_dim
        window: int | None = getattr(attention, "sliding_window", None)
        if window is None and attention.config.model_type == "mistral":
            window = attention.config.sliding_window
        self.layout = HeadLayout(
            layer=index,
            num_queries=attention.q_proj.out_features // self.head_dim,
            num_keys=attention.k_proj.out_features // self.head_dim,
            scale=attention.scaling,
            window=window,
        )
        self.before_attention = Norm.of(layer.input_layernorm, operations)
        self.before_mlp = Norm.of(layer.post_attention_layernorm, operations)
        self.head_norms: tuple[Norm, Norm] | None = None
        """Of queries and keys, before they are turned."""
        if hasattr(attention, "q_norm"):
            norms = (Norm.of(norm, operations) for norm in (attention.q_norm, attention.k_norm))
            self.head_norms = next(norms), next(norms)
        self._qkv = operations.linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = operations.linear(attention.o_proj)
        self._gate_up = operations.linear(mlp.gate_proj, mlp.up_proj)
        self._down = operations.linear(mlp.down_proj)
        self.width: int = mlp.down_proj.in_features
        """Of the MLP."""
        self.activation = None if _is_silu(mlp.act_fn) else mlp.act_fn
        """Of the MLP's gates; None: x·sigmoid(x)."""

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        """Queries, keys and values; attention's output; gates and ups; the MLP's output."""
        return self._qkv, self._out, self._gate_up, self._down

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(linear.num_bytes for linear in self.linears)

    def __call__(
        self,
        h: Tensor,
        shape: tuple[int, int],
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        plan: EditPlan,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What the layer puts out for h (N, d), the edits inside it included; h may be
        overwritten. With ``rows`` (R,) only those go on once keys and values are stored."""
        x = self.before_attention(h)
        attended = self._attend(x, shape, cos, sin, batch)
        if rows is not None:
            h, x, attended = (tensor.index_select(0, rows) for tensor in (h, x, attended))
        h = self._added(h, self._out, attended, "attn_output", x, plan)
        x = self.before_mlp(h)
        return self._added(h, self._down, self._activated(x), "mlp_output", x, plan)

    def edit_output(self, h: Tensor, plan: EditPlan) -> Tensor:
        """What the layer puts out (N, d), changed in place by the edits of it."""
        return self._edited("block_output", h, h, plan)

    def _attend(
        self, x: Tensor, shape: tuple[int, int], cos: Tensor, sin: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """Attention (N, H·D) before the output projection."""
        heads = self._qkv(x).view(len(x), -1, self.head_dim)  # (N, H + 2·KH, D)
        if self.head_norms is not None:
            sizes = (self.layout.num_queries, self.layout.num_keys)
            for norm, part in zip(
                self.head_norms, heads.split((*sizes, sizes[1]), 1), strict=False
            ):
                part.copy_(norm(part))
        return self._operations.attend(heads, self.layout, cos, sin, batch, shape)

    def _activated(self, x: Tensor) -> Tensor:
        """act(gate) ∘ up (N, width) of the MLP."""
        gate_up = self._gate_up(x)
        if self.activation is None:
            return self._operations.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        product: Tensor = self.activation(gate).mul_(up)
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


def _is_silu(activation: nn.Module) -> bool:
    """Whether an activation is x·sigmoid(x), by whatever class."""
    probe = torch.linspace(-4, 4, 9)
    return torch.equal(activation(probe), nn.functional.silu(probe))
