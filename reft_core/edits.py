"""The canonical edit: one formula that every method reduces to.

At a site with output h and input x, an edit adds

    Δ(h, x) = scale · ( act(x·down + bias) − x·skip ) · up + shift + gain ∘ h

with row vectors h, x (N, d); down, skip (d, r); up (r, d); bias (r,); shift, gain (d,).
Absent parts contribute nothing. At ``block_output``, ReFT's site, x is h itself. Where a
site's input and output differ in width, down and skip have the width of x, the rest that of h.

Dimension letters: N tokens, d width of h (mostly the hidden size), r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["identity", "relu", "gelu", "silu", "tanh", "sigmoid"]
Part = Literal["down", "skip", "up", "bias", "shift", "gain"]

Source = Literal["output", "input"]
"""What x is: the site's own output h (series), or its input (parallel, LoRA)."""

PARTS: tuple[Part, ...] = get_args(Part)
ACTIVATION_NAMES: tuple[Activation, ...] = get_args(Activation)

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activate(name: Activation, x: Tensor) -> Tensor:
    """``x`` through the named activation; same shape and dtype."""
    return _ACTIVATIONS[name](x)


@dataclass(frozen=True)
class Edit:
    """One edit's tensors, in the letters of this module's formula.

    ``down`` and ``up`` come together or not at all; ``skip`` and ``bias`` need them. Bound to
    the rows of one forward, an edit may have a bias for each row, (N, r).
    """

    down: Tensor | None = None
    skip: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None
    gain: Tensor | None = None
    activation: Activation = "identity"
    scale: float = 1.0
    source: Source = "output"

    def __post_init__(self) -> None:
        assert (self.down is None) == (self.up is None), "down and up come together"
        assert self.down is not None or (self.skip is None and self.bias is None)

    @property
    def rank(self) -> int:
        """r of the low-rank part, 0 when there is none."""
        return 0 if self.down is None else self.down.shape[1]

    def parts(self) -> Iterator[tuple[Part, Tensor]]:
        """Each tensor that is present, by the name it has in the adapter file."""
        for part in PARTS:
            tensor: Tensor | None = getattr(self, part)
            if tensor is not None:
                yield part, tensor

    @cached_property
    def addresses(self) -> tuple[int, ...] | None:
        """Where down, up, bias, shift and gain lie in memory, 0 for absent ones.

        For compiled loops, which know contiguous float32 tensors and a folded edit without an
        activation; None for any other.
        """
        if self.activation != "identity" or self.source != "output" or self.scale != 1.0:
            return None
        tensors = (self.down, self.up, self.bias, self.shift, self.gain)
        present = [tensor for tensor in tensors if tensor is not None]
        if self.skip is not None or not all(
            tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in present
        ):
            return None
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)

    @property
    def bias_stride(self) -> int:
        """Numbers from one row's bias to the next one's: 0 unless each row has its own."""
        return self.rank if self.bias is not None and self.bias.dim() == 2 else 0

    @property
    def num_parameters(self) -> int:
        """Numbers stored, over all parts."""
        return sum(tensor.numel() for _, tensor in self.parts())

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Edit:
        """The same edit with contiguous tensors of another dtype or on another device."""
        moved = {
            part: tensor.to(dtype=dtype, device=device).contiguous()
            for part, tensor in self.parts()
        }
        if all(moved[part] is tensor for part, tensor in self.parts()):
            return self
        return replace(self, **moved)  # type: ignore[arg-type]

    def fold(self) -> Edit:
        """An equal edit that costs fewer products.

        With the identity activation skip merges into down: (x·down + bias − x·skip) equals
        x·(down − skip) + bias, and the scale merges into up. LoReFT thereby becomes two
        thin products: down = Wᵀ − R, up = Rᵀ. Other activations keep their form.
        """
        if self.down is None or self.up is None or self.activation != "identity":
            return self
        down = self.down if self.skip is None else self.down - self.skip  # (d, r)
        up = self.up if self.scale == 1.0 else self.up * self.scale  # (r, d)
        return replace(self, down=down, skip=None, up=up, scale=1.0)

    def times(self, strength: float) -> Edit:
        """The edit whose Δ is ``strength`` times as large, with the scale multiplied in."""
        factor = strength * self.scale
        return replace(
            self,
            up=None if self.up is None else self.up * factor,
            shift=None if self.shift is None else self.shift * strength,
            gain=None if self.gain is None else self.gain * strength,
            scale=1.0,
        )

    def scale_ranks(self, factors: Tensor) -> Edit:
        """The edit with each rank's contribution multiplied by its factor (r,)."""
        assert self.up is not None, "only a low-rank edit has ranks to scale"
        return replace(self, up=self.up * factors.to(self.up).unsqueeze(1))

    def delta(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """Δ(h, x) of this module's formula, (N, d), in float32.

        h (N, d) is the site's output, x (N, d_x) its input; x is needed, and read, only when
        ``source`` is "input". Both may be of any float dtype. The arithmetic is float32:
        bfloat16 has 8 bits of mantissa, and LoReFT's difference is of nearly equal numbers.
        Of a stack of A edits (:func:`stack_edits`), h, x and Δ have A in front.
        """
        h = h.float()
        if self.source == "input":
            assert x is not None, "this edit reads the site's input"
            x = x.float()
        else:
            x = h
        out: Tensor | None = None
        if self.down is not None and self.up is not None:
            if self.bias is None:
                inner = x @ self.down
            else:
                product = torch.addmm if x.dim() == 2 else torch.baddbmm
                inner = product(self.bias, x, self.down)
            inner = activate(self.activation, inner)  # (N, r)
            if self.skip is not None:
                inner = inner - x @ self.skip
            out = inner @ self.up  # (N, d)
            if self.scale != 1.0:
                out = out * self.scale
        if self.shift is not None:
            out = self.shift.expand_as(h).clone() if out is None else out + self.shift
        if self.gain is not None:
            out = self.gain * h if out is None else torch.addcmul(out, self.gain, h)
        return torch.zeros_like(h) if out is None else out


def stack_edits(edits: Sequence[Edit]) -> Edit:
    """One edit whose :meth:`Edit.delta` applies each of ``edits`` to its own (N, d) rows.

    They must be alike in rank, parts, activation, scale and source. Matrices get A in front,
    vectors become (A, 1, ·), so that all of them broadcast over N.
    """
    first = edits[0]
    parts: dict[str, Tensor] = {}
    for part, tensor in first.parts():
        stack = torch.stack([getattr(edit, part) for edit in edits])
        parts[part] = stack.unsqueeze(1) if tensor.dim() == 1 else stack
    return replace(first, **parts)  # type: ignore[arg-type]
