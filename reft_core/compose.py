"""Two edits at one place as one: the second reads what the first wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from reft_core.edits import Edit


def compose(first: Edit, second: Edit) -> Edit:
    """The edit that equals ``first``, then ``second`` on what it wrote.

    Both have strength and scale 1, the same source, and, where the second reads the output, no
    activation. Of a site's output, with h₁ = h + (h·D₁ + b₁)·U₁ + c₁ + g₁∘h put into the second:

        D = [D₁, D₂ + g₁∘D₂ + D₁·U₁·D₂]     b = [b₁, b₂ + (b₁·U₁ + c₁)·D₂]
        U = [U₁ + g₂∘U₁; U₂]                c = c₁ + g₂∘c₁ + c₂
        g = g₁ + g₂ + g₁∘g₂

    Of its input, which no edit changes, D₂ and b₂ stay as they are; the gain still reads the
    output.
    """
    down, bias = _reading_what_was_written(first, second)
    up, shift = first.up, first.shift
    if second.gain is not None:
        gain = second.gain
        up = _map(lambda up: up + up * gain, up)
        shift = _map(lambda shift: shift + shift * gain, shift)
    first_bias = first.bias
    if first_bias is None and bias is not None and first.down is not None:
        first_bias = first.down.new_zeros(first.rank)
    if bias is None and first_bias is not None and down is not None:
        bias = down.new_zeros(second.rank)
    both_gains = _sum(first.gain, second.gain)
    if first.gain is not None and second.gain is not None:
        both_gains = _sum(both_gains, first.gain * second.gain)
    return replace(
        first,
        down=_join(first.down, down, 1),
        skip=_join(*_with_zeros(first, second), 1),
        up=_join(up, second.up, 0),
        bias=_join(first_bias, bias, 0),
        shift=_sum(shift, second.shift),
        gain=both_gains,
    )


def _reading_what_was_written(first: Edit, second: Edit) -> tuple[Tensor | None, Tensor | None]:
    """The second's down and bias for the state before the first."""
    if second.source == "input" or second.down is None:
        return second.down, second.bias
    down = second.down
    if first.gain is not None:
        down = down + first.gain.unsqueeze(1) * second.down
    if first.down is not None and first.up is not None:
        down = down + first.down @ (first.up @ second.down)
    constant = first.shift
    if first.bias is not None and first.up is not None:
        constant = _sum(constant, first.bias @ first.up)
    return down, _sum(second.bias, None if constant is None else constant @ second.down)


def _with_zeros(first: Edit, second: Edit) -> tuple[Tensor | None, Tensor | None]:
    """Both edits' skips; where one alone has any, zeros stand for the other's."""
    if first.skip is None and second.skip is None:
        return None, None

    def skip(edit: Edit) -> Tensor | None:
        return _map(torch.zeros_like, edit.down) if edit.skip is None else edit.skip

    return skip(first), skip(second)


def _map(function: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else function(tensor)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum, an absent one counting as zero."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _join(first: Tensor | None, second: Tensor | None, dim: int) -> Tensor | None:
    """Both beside each other along ``dim``, or the one there is."""
    if first is None or second is None:
        return second if first is None else first
    return torch.cat([first, second], dim)
