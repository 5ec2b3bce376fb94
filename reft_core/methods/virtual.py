"""Trained virtual tokens: prefix tuning, prompt tuning, and MAM, which adds one to an adapter.

They stand before the prompt at positions 0 to n − 1 and shift everything after them by n. No
state is edited; every later token attends to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from reft_core.adapter import Prefix
from reft_core.sites import ModelDescription
from reft_core.spec import PrefixSpec

_INIT_STD = 0.02
"""Of a transformer's own weights, in BERT, GPT-2 and since."""


@dataclass(frozen=True)
class VirtualMethod:
    """What a method made of virtual tokens consists of."""

    kind: Literal["kv", "embedding"]
    intervention: str | None
    """The method of the registry that is trained beside them, if any."""
    citation: str


VIRTUAL_METHODS: Mapping[str, VirtualMethod] = {
    "prefix_tuning": VirtualMethod("kv", None, "arXiv 2101.00190"),
    "prompt_tuning": VirtualMethod("embedding", None, "arXiv 2104.08691"),
    "mam": VirtualMethod("kv", "scaled_parallel_adapter", "arXiv 2110.04366, §4.6"),
}
"""By name. MAM is prefix tuning at the attention with a scaled parallel adapter at the FFN."""


class VirtualTokens(nn.Module):
    """n trainable virtual tokens for one base model. Parameters are float32.

    Kind ``kv``: keys and values of every layer, L·2·KH·n·D numbers, as they stand in the KV
    cache, rotation included. With ``bottleneck`` m they are, while training, the output of
    W₂·tanh(W₁·e) with one e (d,) a token, as prefix tuning proposes for stability; the file
    holds the result either way. Kind ``embedding``: n·d numbers that take the place of input
    embeddings.

    ``start`` (n, d) is where e, or those embeddings, begin; the trainer gives prompt tuning the
    embeddings of random tokens, as in PEFT (arXiv 2104.08691 samples from the common ones).
    Without it e is drawn from N(0, 1) and W₁, W₂ as linear layers, as in the code of He et al.,
    PEFT and AdapterHub. Keys and values without a bottleneck are drawn from N(0, 0.02²),
    as in He et al.'s ``PrefixDirectInit``, and so are embeddings without a start.
    """

    def __init__(
        self,
        model: ModelDescription,
        kind: Literal["kv", "embedding"],
        length: int,
        *,
        bottleneck: int | None = None,
        start: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.length = length
        self._shape = (model.num_layers, 2, model.num_kv_heads, length, model.head_dim)
        if kind == "embedding" or bottleneck is not None:
            drawn = torch.randn(length, model.hidden_size)
            if kind == "embedding":
                drawn *= _INIT_STD
            self.embedding = nn.Parameter(drawn if start is None else start.float().clone())
        if kind == "kv" and bottleneck is None:
            self.states = nn.Parameter(torch.randn(self._shape) * _INIT_STD)
        if kind == "kv" and bottleneck is not None:
            out = model.num_layers * 2 * model.num_kv_heads * model.head_dim
            self.reparameterisation = nn.Sequential(
                nn.Linear(model.hidden_size, bottleneck), nn.Tanh(), nn.Linear(bottleneck, out)
            )

    def keys_and_values(self) -> Tensor:
        """Kind ``kv``: keys and values (L, 2, KH, n, D), differentiable."""
        if not hasattr(self, "reparameterisation"):
            return self.states
        num_layers, pair, num_heads, length, size = self._shape
        flat: Tensor = self.reparameterisation(self.embedding)  # (n, L·2·KH·D)
        return flat.view(length, num_layers, pair, num_heads, size).permute(1, 2, 3, 0, 4)

    def spec(self) -> PrefixSpec:
        """How the adapter file states them."""
        _, _, num_heads, length, size = self._shape
        if self.kind == "embedding":
            return PrefixSpec(kind="embedding", length=length)
        return PrefixSpec(kind="kv", length=length, num_kv_heads=num_heads, head_dim=size)

    @torch.no_grad()
    def to_prefix(self) -> Prefix:
        """The tokens with the present parameters, detached, on the CPU."""
        if self.kind == "embedding":
            return Prefix(embedding=self.embedding.detach().cpu().clone())
        states = self.keys_and_values().detach().cpu().contiguous()
        return Prefix(tuple(states[:, 0]), tuple(states[:, 1]))
