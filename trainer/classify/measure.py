"""How right an encoder's head is, as plain functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(predicted: Tensor, targets: Tensor) -> float:
    """Share of equal label numbers (n,)."""
    return (predicted == targets).double().mean().item()


def matthews(predicted: Tensor, targets: Tensor) -> float:
    """Matthews correlation of label numbers (n,), for any number of labels (Gorodkin 2004).

    0 where either has one label only.
    """
    num_labels = int(torch.cat([predicted, targets]).max()) + 1
    one_hot = torch.nn.functional.one_hot
    said, right = (one_hot(labels, num_labels).double() for labels in (predicted, targets))
    return pearson(said, right)


def pearson(predicted: Tensor, targets: Tensor) -> float:
    """Correlation of values (n,), or summed over the columns of (n, k); 0 if either is constant."""
    x, y = (values.double() - values.double().mean(0) for values in (predicted, targets))
    scale = ((x**2).sum() * (y**2).sum()).sqrt()
    return ((x * y).sum() / scale).item() if scale > 0 else 0.0
