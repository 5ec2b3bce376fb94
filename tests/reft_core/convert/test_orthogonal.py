"""The rebuilt orthogonal parametrisation equals torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from reft_core.convert.orthogonal import rebuild_orthogonal, rotation_error
from reft_core.convert.tensor_file import TensorFile
from reft_core.errors import AdapterFileInvalid

PREFIX = "layer.parametrizations.weight"


class Holder(nn.Module):
    """A module whose weight (rows, columns) is parametrised, as pyreft's and adapters' are."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))


def parametrised(rows: int, columns: int, steps: int = 3) -> nn.Module:
    """A parametrised weight after a few optimiser steps."""
    module = orthogonal(Holder(rows, columns))
    target = torch.randn(rows, columns)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        (module.weight - target).square().sum().backward()
        optimiser.step()
    return module


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"layer.{key}": value for key, value in module.state_dict().items()}


@pytest.mark.parametrize(("d", "r"), [(24, 1), (24, 4), (7, 6), (5, 5), (1, 1)])
@pytest.mark.parametrize("lies_down", [False, True], ids=["tall", "wide"])
def test_equals_torch(d: int, r: int, lies_down: bool) -> None:
    module = parametrised(r, d) if lies_down else parametrised(d, r)
    expected = module.weight.mT if lies_down else module.weight
    source = TensorFile("f", stored(module))
    if r == d and lies_down:
        expected = module.weight  # a square weight lies neither way
    rotation = rebuild_orthogonal(source, PREFIX, d, r)
    torch.testing.assert_close(rotation, expected.detach(), atol=1e-5, rtol=0)
    assert rotation_error(rotation) < 1e-5
    source.finish()


def test_equals_torch_after_weight_decay() -> None:
    """A diagonal entry below 1 is truncated to 0, which removes a column."""
    module = parametrised(24, 3)
    with torch.no_grad():
        module.parametrizations.weight.original[1, 1] *= 0.99
    rotation = rebuild_orthogonal(TensorFile("f", stored(module)), PREFIX, 24, 3)
    torch.testing.assert_close(rotation, module.weight.detach(), atol=1e-5, rtol=0)
    assert rotation_error(rotation) == pytest.approx(1.0)


def test_missing_and_misshapen_parts_are_named() -> None:
    tensors = stored(parametrised(24, 3))
    with pytest.raises(AdapterFileInvalid, match=r"f: layer.*0\.base: got .*no such key"):
        rebuild_orthogonal(
            TensorFile("f", {k: v for k, v in tensors.items() if "base" not in k}), PREFIX, 24, 3
        )
    with pytest.raises(AdapterFileInvalid, match=r"original: got 'shape \(24, 3\)'"):
        rebuild_orthogonal(TensorFile("f", tensors), PREFIX, 24, 4)
    with pytest.raises(AdapterFileInvalid, match=r"original: got None, expected"):
        rebuild_orthogonal(TensorFile("f", {}), PREFIX, 24, 4)
