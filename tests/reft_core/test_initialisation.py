"""Where each method starts: the distribution of every parameter, as its docstring states it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from reft_core.edits import Activation
from reft_core.methods import METHODS, SiteSizes, get_method
from reft_core.methods.rotated import orthonormal_init
from reft_core.methods.virtual import VirtualTokens
from tests.factories import assert_close, tiny_description

D, X, RANK, HEADS = 192, 256, 24, 8
"""Wide enough for moments to be told apart; input and output of the site differ."""


@dataclass(frozen=True)
class Constant:
    """Every number is ``value``."""

    value: float

    def check(self, drawn: Tensor) -> None:
        assert (drawn == self.value).all()


@dataclass(frozen=True)
class Uniform:
    """Uniform between two bounds."""

    low: float
    high: float

    def check(self, drawn: Tensor) -> None:
        width = self.high - self.low
        assert self.low <= drawn.min()
        assert drawn.max() <= self.high
        margin = 6 / math.sqrt(12 * drawn.numel())  # six standard errors of the mean
        assert abs(float(drawn.mean()) - (self.low + self.high) / 2) < margin * width
        if drawn.numel() > 1000:
            assert float(drawn.std()) == pytest.approx(width / math.sqrt(12), rel=0.1)


@dataclass(frozen=True)
class Normal:
    """Normal around zero; cut off at two standard deviations or not at all."""

    std: float
    cut: bool = False

    def check(self, drawn: Tensor) -> None:
        shrunk = 0.8796 if self.cut else 1  # of a normal distribution cut off at 2σ
        assert float(drawn.std()) == pytest.approx(self.std * shrunk, rel=0.1)
        assert abs(float(drawn.mean())) < 6 * self.std / math.sqrt(drawn.numel())
        assert (float(drawn.abs().max()) <= 2 * self.std) == self.cut


class Orthonormal:
    """Orthonormal columns, with signs that nothing favours."""

    def check(self, drawn: Tensor) -> None:
        assert_close(drawn.mT @ drawn, torch.eye(drawn.shape[1]))
        assert float(drawn.std()) == pytest.approx(1 / math.sqrt(len(drawn)), rel=0.1)


def like_linear(num_inputs: int) -> Uniform:
    """How torch's linear layer draws its weight and its bias: Kaiming uniform with a = √5."""
    return Uniform(-1 / math.sqrt(num_inputs), 1 / math.sqrt(num_inputs))


ZERO, ONE = Constant(0), Constant(1)
PARALLEL = {"down": like_linear(X), "down_bias": ZERO, "up": ZERO, "up_bias": ZERO}
HOULSBY = Normal(0.01, cut=True)
STARTS = {
    "loreft": {"basis": Orthonormal(), "bias": ZERO},
    "direft": {"weight": like_linear(D), "bias": ZERO, "up": ZERO},
    "direft_orthonormal": {"basis": Orthonormal(), "weight": ZERO, "bias": ZERO},
    "noreft": {
        "weight": like_linear(D),
        "bias": like_linear(D),
        "projection": like_linear(D),
    },
    "consreft": {"basis": Orthonormal(), "target": Uniform(0, 1)},
    "lobireft": {"basis": Orthonormal(), "target": Uniform(0, 1)},
    "interchange": {"basis": Orthonormal()},
    "red": {"scaling": ONE, "bias": ZERO},
    "steering": {"vector": ZERO},
    "bitfit": {"vector": ZERO},
    "lora": {"down": like_linear(X), "up": ZERO},
    "series_adapter": {"down": HOULSBY, "down_bias": ZERO, "up": HOULSBY, "up_bias": ZERO},
    "parallel_adapter": PARALLEL,
    "scaled_parallel_adapter": PARALLEL,
    "multi_head_parallel_adapter": {
        "down": like_linear(X),
        "down_bias": ZERO,
        "head_up": ZERO,
        "up_bias": ZERO,
    },
}
"""By method and parameter; loreft's weight is R itself."""


def parameters(method: str, activation: Activation | None = None) -> dict[str, Tensor]:
    """A fresh module's parameters."""
    torch.manual_seed(3)
    cls = get_method(method)
    sizes = SiteSizes(X, D, head_dim=D // HEADS)
    module = cls(sizes, RANK, activation or cls.activations[0])
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_its_docstring_says(method: str) -> None:
    found = parameters(method)
    expected = STARTS[method]
    for name, distribution in expected.items():
        distribution.check(found[name])
    assert set(found) - set(expected) == ({"weight"} if method == "loreft" else set())


def test_loreft_starts_with_its_source_in_its_subspace() -> None:
    found = parameters("loreft")
    assert_close(found["weight"], found["basis"].mT, tolerance=0)


def test_direft_under_relu_draws_its_source() -> None:
    """From zero it would never learn."""
    found = parameters("direft_orthonormal", "relu")
    like_linear(D).check(found["weight"])
    ZERO.check(found["bias"])


def test_no_sign_of_a_basis_is_favoured() -> None:
    torch.manual_seed(4)
    num_positive = sum(orthonormal_init(D, 1)[0, 0] > 0 for _ in range(64))
    assert 16 < num_positive < 48


def test_a_series_adapter_starts_near_the_base() -> None:
    module = get_method("series_adapter")(SiteSizes(D, D), RANK, "gelu")
    h = torch.randn(100, D)
    delta = module(h, h).detach()
    assert 0 < float(delta.norm() / h.norm()) < 0.01


@torch.no_grad()
def test_virtual_tokens_start_as_their_docstring_says() -> None:
    torch.manual_seed(5)
    model, small, unit = tiny_description(), Normal(0.02), Normal(1.0)
    small.check(VirtualTokens(model, "kv", 64).states)
    small.check(VirtualTokens(model, "embedding", 64).embedding)
    made = VirtualTokens(model, "kv", 64, bottleneck=48)
    unit.check(made.embedding)
    first, _, second = made.reparameterisation
    for layer, num_inputs in ((first, model.hidden_size), (second, 48)):
        like_linear(num_inputs).check(layer.weight)
        like_linear(num_inputs).check(layer.bias)
    start = torch.randn(64, model.hidden_size)
    for kind, bottleneck in (("embedding", None), ("kv", 8)):
        tokens = VirtualTokens(model, kind, 64, bottleneck=bottleneck, start=start)
        assert_close(tokens.embedding.detach(), start, tolerance=0)
