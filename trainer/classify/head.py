"""The trained head of a classifier, while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.adapter import Head
from reft_core.methods.base import linear_init
from reft_core.spec import HeadSpec

_INIT_STD = 0.02
"""Of an output layer's weights, as in BERT."""


class TrainableHead(nn.Module):
    """act(p·W₁ + b₁)·W₂ + b₂ of pooled states p, or p·W₂ + b₂; the letters of :class:`Head`.

    W₂ is drawn from N(0, 0.02²), as in BERT; W₁ and b₁ as a linear layer's. While it is
    trained, dropout acts on p. b₂ starts at the logs of the
    labels' shares, so that the untrained head already says what is known without a text.

    A regression has one output, y = σ·z + μ. Training sees z, whose targets have mean 0 and
    variance 1; σ and μ, those of the training rows, are worked into W₂ and b₂ in the end.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, spec: HeadSpec, hidden_size: int, num_outputs: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.spec = spec
        self.dropout = dropout
        width = spec.hidden or hidden_size
        if spec.hidden is not None:
            self.dense_weight = nn.Parameter(linear_init(hidden_size, hidden_size, width))
            self.dense_bias = nn.Parameter(linear_init(hidden_size, width))
        self.out_weight = nn.Parameter(torch.randn(width, num_outputs) * _INIT_STD)
        self.out_bias = nn.Parameter(torch.zeros(num_outputs))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    @torch.no_grad()
    def start_from(self, targets: Sequence[float], *, regression: bool) -> None:
        """Begin with what the training rows' targets say without their texts.

        They are label numbers, or values for ``regression``; a label without rows counts as
        half a row.
        """
        values = torch.tensor(targets, dtype=torch.float64)
        if regression:
            self.shift.fill_(values.mean())
            deviation = values.std(correction=0)
            self.scale.fill_(deviation if deviation > 0 else 1.0)
        else:
            counts = torch.bincount(values.long(), minlength=len(self.out_bias)).clamp(min=0.5)
            self.out_bias.copy_((counts / counts.sum()).log())

    @override
    def forward(self, pooled: Tensor) -> Tensor:
        """Logits or values (B, L), float32, of pooled states (B, d)."""
        return self._head().logits(F.dropout(pooled.float(), self.dropout, self.training))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is minimised, (), for outputs (B, L) of this head and targets (B,).

        Cross entropy of label numbers, or the squared error of z.
        """
        if targets.dtype == torch.int64:
            return F.cross_entropy(outputs, targets)
        z = (outputs.squeeze(1) - self.shift) / self.scale  # (B,)
        return F.mse_loss(z, (targets - self.shift) / self.scale)

    @torch.no_grad()
    def to_head(self) -> Head:
        """The head with the present parameters, detached, on the CPU."""
        return self._head().to("cpu")

    def _head(self) -> Head:
        """The head as it is stored, differentiable."""
        return Head(
            out_weight=self.out_weight * self.scale,
            out_bias=self.out_bias * self.scale + self.shift,
            dense_weight=self.dense_weight.clone() if self.spec.hidden else None,
            dense_bias=self.dense_bias.clone() if self.spec.hidden else None,
            activation=self.spec.activation,
        )
