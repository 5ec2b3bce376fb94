"""The forward of Llama-like models on a CPU, with fewer and faster operations.

Computes what transformers' code computes, over weights that oneDNN has laid out for its own
kernels: one product for query, key and value, one for gate and up. It serves the forwards whose
edits act at the sites it passes by; the runner gives all others to transformers' code, and
compares the two when it starts. The packed weights are a second copy of the model's.

Letters: B sequences, T new tokens of each, N = B·T, H query heads, KH key-value heads, D head
size, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_core.batch import EditPlan
from reft_core.engine.attention import ForwardBatch
from reft_core.kernels import apply_edits
from reft_core.sites import find_layers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are known to be put together as below."""

_SITES = ("block_output", "attn_output", "mlp_output")
_PACK_ROWS = 16
"""Rows for which the layout is chosen; it serves all numbers of rows about as well."""


class PackedLinear:
    """x Wᵀ + b for the rows of one or several linear maps, one below the other."""

    def __init__(self, *maps: nn.Linear) -> None:
        weight = torch.cat([linear.weight for linear in maps])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        biases: list[Tensor] = [linear.bias for linear in maps if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self.num_bytes = weight.numel() * weight.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        """Of x (N, in), as (N, out)."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return product


@dataclass(frozen=True)
class _Norm:
    """Root-mean-square norm over the last dimension."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> _Norm | None:
        return None if module is None else cls(module.weight, module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._head_dim: int = attention.head_dim
        self._num_queries = attention.q_proj.out_features // self._head_dim
        self._num_keys = attention.k_proj.out_features // self._head_dim
        self._scale: float = attention.scaling
        self._window: int | None = getattr(attention, "sliding_window", None)
        if self._window is None and attention.config.model_type == "mistral":
            self._window = attention.config.sliding_window
        self._norms = _Norm.of(layer.input_layernorm), _Norm.of(layer.post_attention_layernorm)
        self._query_norm = _Norm.of(getattr(attention, "q_norm", None))
        self._key_norm = _Norm.of(getattr(attention, "k_norm", None))
        self._qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = PackedLinear(attention.o_proj)
        self._gate_up = PackedLinear(mlp.gate_proj, mlp.up_proj)
        self._down = PackedLinear(mlp.down_proj)
        self._activation = mlp.act_fn

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
    ) -> None:
        """Change h (N, d) in place to what the layer puts out, its edits included."""
        before_attention, before_mlp = self._norms
        assert before_attention is not None
        assert before_mlp is not None
        x = before_attention(h)
        h += self._edited("attn_output", self._attention(x, shape, cos, sin, batch), x, plan)
        x = before_mlp(h)
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        h += self._edited("mlp_output", self._down(self._activation(gate).mul_(up)), x, plan)
        self._edited("block_output", h, h, plan)

    def _attention(
        self, x: Tensor, shape: tuple[int, int], cos: Tensor, sin: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """The attention's output (N, d)."""
        num_queries, num_keys = self._num_queries, self._num_keys
        heads = self._qkv(x).view(len(x), -1, self._head_dim)  # (N, H + 2·KH, D)
        turned, value = heads.tensor_split([num_queries + num_keys], dim=1)
        if self._query_norm is not None and self._key_norm is not None:
            query, key = turned.tensor_split([num_queries], dim=1)
            turned = torch.cat((self._query_norm(query), self._key_norm(key)), dim=1)
        left, right = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((right, left), dim=-1) * sin
        query, key = turned.tensor_split([num_queries], dim=1)
        query, key, value = (
            part.unflatten(0, shape).transpose(1, 2) for part in (query, key, value)
        )  # (B, heads, T, D)
        attended = batch.attend(self._index, query, key, value, self._scale, self._window, None)
        return self._out(attended.reshape(len(x), -1))

    def _edited(self, site: str, output: Tensor, x: Tensor, plan: EditPlan) -> Tensor:
        """A site's output (N, d), changed in place by its edits."""
        if edits := plan.places.get((self._index, site)):
            apply_edits(output, x, edits)
        return output


class FusedForward:
    """See the module. Weights are packed on construction."""

    def __init__(self, model: PreTrainedModel) -> None:
        inner: Any = model.get_decoder()
        self._embed: nn.Embedding = inner.embed_tokens
        self._rotary = inner.rotary_emb
        self._norm = _Norm.of(inner.norm)
        self._layers = [_Layer(layer, i) for i, layer in enumerate(find_layers(model))]
        head: Any = model.get_output_embeddings()
        self._head = PackedLinear(head)
        self.num_bytes = self._head.num_bytes + sum(layer.num_bytes for layer in self._layers)

    @staticmethod
    def is_for(model: PreTrainedModel) -> bool:
        """Whether this machine and this model have what the forward needs."""
        parameter = next(model.parameters())
        if parameter.device.type != "cpu" or model.config.model_type not in FAMILIES:
            return False
        if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return False
        if parameter.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        linears = [type(module) for module in model.modules() if isinstance(module, nn.Linear)]
        return parameter.dtype == torch.float32 and set(linears) == {nn.Linear}

    @staticmethod
    def can_edit(plan: EditPlan) -> bool:
        """Whether all edits of a plan act where this forward passes by."""
        return all(
            site in _SITES
            and not (site == "block_output" and any(e.edit.source == "input" for e in edits))
            for (_, site), edits in plan.places.items()
        )

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        batch: ForwardBatch,
        keep: Tensor | int,
        plan: EditPlan,
    ) -> Tensor:
        """Logits (B, K, V) for tokens and positions (B, T), in the model's dtype.

        ``keep`` selects the K of T columns whose logits are wanted: indices, the last so many,
        or 0 for all.
        """
        assert self._norm is not None
        num_rows, num_columns = tokens.shape
        hidden = self._embed(tokens)  # (B, T, d), a fresh tensor
        cos, sin = self._rotary(hidden, positions)  # (B, T, D)
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        cos, signed = (angle.flatten(0, 1).unsqueeze(1) for angle in (cos, signed))  # (N, 1, D)
        h = hidden.flatten(0, 1)
        for layer in self._layers:
            layer(h, (num_rows, num_columns), cos, signed, batch, plan)
        columns = keep if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
        kept = hidden[:, columns]
        return self._head(self._norm(kept.flatten(0, 1))).unflatten(0, kept.shape[:2])
