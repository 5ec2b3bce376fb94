"""A frozen base model with parts that training changes, whatever the kind of base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override


class FrozenBase(nn.Module, ABC):
    """The base's parameters are frozen in place, and it stays in eval mode.

    Those that are ``tuned`` are trained with the parts nevertheless: all of them in full
    fine-tuning, or what another library put into the base. Implements
    :class:`trainer.task.TrainedModel` but for the forward.
    """

    def __init__(self, base: PreTrainedModel, tuned: Sequence[nn.Parameter] = ()) -> None:
        super().__init__()
        self.base: Any = base.requires_grad_(False).eval()
        self.tuned = nn.ParameterList(tuned).requires_grad_(True)

    @property
    @abstractmethod
    def trained_parts(self) -> list[nn.Module]:
        """The modules that training changes."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and batches are to be."""
        device: torch.device = self.base.device
        return device

    @override
    def train(self, mode: bool = True) -> Self:
        """Set the mode of the trained parts; the frozen base keeps its dropout off."""
        super().train(mode)
        self.base.eval()
        return self

    def trainable(self) -> list[nn.Parameter]:
        """The parameters the optimiser may change."""
        return [p for part in self.trained_parts for p in part.parameters() if p.requires_grad]

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """:meth:`trainable` as torch's optimisers take them."""
        return [{"params": self.trainable(), "lr": learning_rate}]

    def trained_state(self) -> list[dict[str, Tensor]]:
        """A copy of what training changes."""
        return [
            {name: tensor.clone() for name, tensor in part.state_dict().items()}
            for part in self.trained_parts
        ]

    def load_trained_state(self, state: Sequence[dict[str, Tensor]]) -> None:
        """Put back what :meth:`trained_state` returned."""
        for part, tensors in zip(self.trained_parts, state, strict=True):
            part.load_state_dict(tensors)
