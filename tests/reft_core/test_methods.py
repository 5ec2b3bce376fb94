"""Every method trains, stays what its equation says, and ends as the edit it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reft_core.edits import ACTIVATION_NAMES, Activation, Edit, Part, activate
from reft_core.errors import InvalidRequest
from reft_core.methods import METHODS, Intervention, get_method
from reft_core.methods.base import orthonormal_init, orthonormalise
from reft_core.methods.loreft import LoReFT
from tests.factories import assert_close

D = 16

CASES = [
    (method, activation)
    for method, cls in sorted(METHODS.items())
    for activation in getattr(cls, "activations", ACTIVATION_NAMES)
]
"""Every method with every activation it takes; all of them, unless it says otherwise."""

every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_case = pytest.mark.parametrize(("method", "activation"), CASES)


def moved(method: str, rank: int = 3, activation: Activation = "identity") -> Intervention:
    """A module whose parameters are away from their initial values."""
    module = get_method(method)(D, rank, activation)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def formula(module: Intervention, h: Tensor) -> Tensor:
    """The method's published equation (peers.md, 2), from its parameters."""
    p = {name: parameter.detach() for name, parameter in module.named_parameters()}
    source = activate(module.activation, h @ p["weight"].mT + p["bias"]) if "weight" in p else 0
    rotation = orthonormalise(p["basis"]) if "basis" in p else h.new_zeros(D, 0)
    match module.method:
        case "loreft":
            return (source - h @ rotation) @ rotation.mT
        case "direft":
            return source @ p["up"]
        case "direft_orthonormal":
            return source @ rotation.mT
        case "noreft":
            return (source - h @ p["projection"].mT) @ p["projection"]
        case "consreft":
            return (p["target"] - h @ rotation) @ rotation.mT
        case "lobireft":
            return (p["target"] @ rotation.mT).expand_as(h)
        case "red":
            return h * p["scaling"] + p["bias"] - h
        case "steering":
            return p["vector"].expand_as(h)
    pytest.fail(f"write {module.method}'s equation here")


def train_a_step(module: Intervention, optimiser: torch.optim.Optimizer) -> None:
    """Towards a target that no edit of low rank reaches."""
    h, target = torch.randn(2, 32, D)
    optimiser.zero_grad()
    (module(h) - target).square().mean().backward()
    optimiser.step()


@every_case
@pytest.mark.parametrize("rank", [1, 3, D])
def test_the_edit_computes_what_was_trained(method: str, activation: Activation, rank: int) -> None:
    module = moved(method, rank, activation)
    h = torch.randn(7, D)
    edit = module.to_edit()
    assert_close(module(h).detach(), formula(module, h))
    assert_close(edit.delta(h), module(h).detach())
    assert edit.activation == activation
    assert edit.rank == (rank if "down" in module.parts(activation) else 0)


@every_case
def test_parts_are_those_of_the_edit(method: str, activation: Activation) -> None:
    edit = moved(method, activation=activation).to_edit()
    assert tuple(part for part, _ in edit.parts()) == get_method(method).parts(activation)
    assert all(not t.requires_grad and t.dtype == torch.float32 for _, t in edit.parts())


@every_case
def test_edits_are_folded(method: str, activation: Activation) -> None:
    edit = moved(method, activation=activation).to_edit()
    assert edit.scale == 1.0
    assert edit.skip is None or activation != "identity"


@every_method
def test_training_on_does_not_change_an_edit_already_made(method: str) -> None:
    module = moved(method)
    h = torch.randn(7, D)
    edit = module.to_edit()
    before = edit.delta(h)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-3)
    assert_close(edit.delta(h), before, tolerance=0)


SLOPED_AT_ZERO: list[Activation] = ["identity", "gelu", "silu", "tanh"]


@pytest.mark.parametrize(
    ("method", "activation"),
    [
        ("loreft", "identity"),
        *(("direft", activation) for activation in ACTIVATION_NAMES),
        *(("direft_orthonormal", activation) for activation in SLOPED_AT_ZERO),
    ],
)
def test_untrained_edits_change_nothing(method: str, activation: Activation) -> None:
    """For these. The others cannot start at zero: LoReFT's difference with an activation,
    sigmoid(0) = ½, and relu under an orthonormal R, whose gradient at zero is zero.
    """
    h = torch.randn(50, D)
    module = get_method(method)(D, 4, activation)
    assert_close(module(h).detach(), torch.zeros(50, D))
    assert_close(module.to_edit().delta(h), torch.zeros(50, D))


@pytest.mark.parametrize("method", ["loreft", "direft_orthonormal"])
@pytest.mark.parametrize("rank", [1, 4, D])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_steps_keep_the_columns_orthonormal(method: str, rank: int, weight_decay: float) -> None:
    """torch's own parametrisation loses R in one AdamW step with weight decay (peers.md, 5)."""
    module = moved(method, rank)
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=weight_decay)
    for _ in range(5):
        train_a_step(module, optimiser)
        up = module.to_edit().up
        assert up is not None
        # A square basis after steps longer than its columns is the worst conditioned.
        assert_close(up @ up.mT, torch.eye(rank), tolerance=1e-5 if rank < D else 1e-3)


def test_loreft_edits_within_its_subspace_alone() -> None:
    """Rᵀ(h + Δ(h)) is the trained source; the rest of h is untouched."""
    module = moved("loreft", 4)
    assert isinstance(module, LoReFT)
    h = torch.randn(9, D)
    with torch.no_grad():
        edited, rotation = h + module(h), module.rotation()
        source = h @ module.weight.mT + module.bias
        outside = torch.eye(D) - rotation @ rotation.mT
    assert_close(edited @ rotation, source)
    assert_close(edited @ outside, h @ outside)


@every_case
def test_gradients_reach_every_parameter(method: str, activation: Activation) -> None:
    module = moved(method, activation=activation)
    module(torch.randn(20, D)).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_case
def test_an_untrained_module_can_start_to_learn(method: str, activation: Activation) -> None:
    """A start where every gradient is zero would stay there for ever."""
    module = get_method(method)(D, 3, activation)
    losses = []
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.0)
    h = torch.randn(32, D)
    target = 1 + h / 2
    for _ in range(30):
        optimiser.zero_grad()
        loss = (module(h) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("method", "rank", "numbers"),
    [
        ("loreft", 3, 2 * 3 * D + 3),
        ("direft", 3, 2 * 3 * D + 3),
        ("direft_orthonormal", 1, 2 * D + 1),
    ],
)
def test_num_trainable(method: str, rank: int, numbers: int) -> None:
    module = get_method(method)(D, rank)
    assert module.num_trainable == numbers
    next(module.parameters()).requires_grad_(False)
    assert module.num_trainable < numbers


@pytest.mark.parametrize(("d", "r"), [(1, 1), (8, 3), (8, 8), (64, 16)])
def test_orthonormalise(d: int, r: int) -> None:
    """Orthonormal columns of the same span, at any length of the columns."""
    start = orthonormal_init(d, r)
    assert_close(start.mT @ start, torch.eye(r))
    assert_close(orthonormalise(start), start)
    for factor in (1e-3, 1e3):
        a = torch.randn(d, r) * factor
        q = orthonormalise(a)
        assert_close(q.mT @ q, torch.eye(r), tolerance=1e-3)
        assert_close(q @ (q.mT @ a) / factor, a / factor, tolerance=1e-3)


@every_method
def test_every_method_says_what_it_is(method: str) -> None:
    cls = get_method(method)
    assert cls.method == method
    assert cls.equation
    assert cls.source


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        get_method("loraft")
    assert caught.value.field == "method"
    names = ", ".join(sorted(METHODS))
    assert str(caught.value) == f"method: got 'loraft', expected one of {names}"


@pytest.mark.parametrize("rank", [0, D + 1])
def test_a_rank_outside_the_hidden_size_breaks_an_invariant(rank: int) -> None:
    with pytest.raises(AssertionError, match=f"rank {rank}"):
        LoReFT(D, rank)


def test_parts_of_the_edit_have_the_shapes_of_the_algebra() -> None:
    shapes: dict[Part, tuple[int, ...]] = {
        "down": (D, 3),
        "skip": (D, 3),
        "up": (3, D),
        "bias": (3,),
    }
    edit: Edit = moved("loreft", activation="relu").to_edit()
    assert {part: tuple(tensor.shape) for part, tensor in edit.parts()} == shapes
