"""Every method trains, stays what its equation says, and ends as the edit it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reft_core.edits import ACTIVATION_NAMES, Activation, Edit, Part, activate
from reft_core.errors import InvalidRequest
from reft_core.methods import METHODS, Intervention, SiteSizes, get_method
from reft_core.methods.loreft import LoReFT
from reft_core.methods.rotated import orthonormal_init, orthonormalise
from tests.factories import assert_close

D, X = 16, 24
"""Widths of a site's output and input; they differ, so neither can stand for the other."""
HEADS = 4
SIZES = SiteSizes(X, D, head_dim=D // HEADS)

CASES = [
    (method, activation)
    for method, cls in sorted(METHODS.items())
    for activation in cls.activations
]
"""Every method with every activation it takes."""

every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_case = pytest.mark.parametrize(("method", "activation"), CASES)


def fresh(method: str, rank: int = 3, activation: Activation = "identity") -> Intervention:
    """An untrained module; a rank of heads is at most that of one head."""
    if get_method(method).sites == ("heads",):
        rank = min(rank, D // HEADS)
    return get_method(method)(SIZES, rank, activation)


def inputs(num_tokens: int) -> tuple[Tensor, Tensor]:
    """A site's output and input."""
    return torch.randn(num_tokens, D), torch.randn(num_tokens, X)


def moved(method: str, rank: int = 3, activation: Activation = "identity") -> Intervention:
    """A module whose parameters are away from their initial values."""
    module = fresh(method, rank, activation)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def formula(module: Intervention, h: Tensor, x: Tensor) -> Tensor:
    """The method's published equation, from its parameters."""
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
        case "interchange":
            return (0 - h @ rotation) @ rotation.mT
        case "consreft":
            return (p["target"] - h @ rotation) @ rotation.mT
        case "lobireft":
            return (p["target"] @ rotation.mT).expand_as(h)
        case "red":
            return h * p["scaling"] + p["bias"] - h
        case "steering" | "bitfit":
            return p["vector"].expand_as(h)
        case "lora":
            return x @ p["down"].mT @ p["up"].mT
        case "series_adapter":
            return bottleneck(module, p, h)
        case "parallel_adapter":
            return bottleneck(module, p, x)
        case "scaled_parallel_adapter":
            return 4 * bottleneck(module, p, x)
        case "multi_head_parallel_adapter":
            rank = len(p["down"]) // HEADS
            width = D // HEADS
            heads = []
            for i in range(HEADS):
                rows, columns = slice(i * rank, (i + 1) * rank), slice(i * width, (i + 1) * width)
                inner = activate(module.activation, x @ p["down"][rows].mT + p["down_bias"][rows])
                heads.append(inner @ p["head_up"][i] + p["up_bias"][columns])
            return torch.cat(heads, dim=1)
    pytest.fail(f"write {module.method}'s equation here")


def bottleneck(module: Intervention, p: dict[str, Tensor], x: Tensor) -> Tensor:
    inner = activate(module.activation, x @ p["down"].mT + p["down_bias"])
    return inner @ p["up"].mT + p["up_bias"]


def train_a_step(module: Intervention, optimiser: torch.optim.Optimizer) -> None:
    """Towards a target that no edit of low rank reaches."""
    (h, x), target = inputs(32), torch.randn(32, D)
    optimiser.zero_grad()
    (module(h, x) - target).square().mean().backward()
    optimiser.step()


@every_case
@pytest.mark.parametrize("rank", [1, 3, D])
def test_the_edit_computes_what_was_trained(method: str, activation: Activation, rank: int) -> None:
    module = moved(method, rank, activation)
    h, x = inputs(7)
    edit = module.to_edit()
    assert_close(module(h, x).detach(), formula(module, h, x))
    assert_close(edit.delta(h, x), module(h, x).detach())
    if module.source == "output":
        assert_close(edit.delta(h), module(h, h).detach())
    assert edit.activation == activation
    assert edit.source == module.source
    if method == "multi_head_parallel_adapter":
        assert edit.rank == HEADS * min(rank, D // HEADS)
    else:
        assert edit.rank == (rank if "down" in module.parts(activation) else 0)


@every_method
def test_what_a_method_reads(method: str) -> None:
    """Δ follows the one of h and x that its source names; RED and friends neither."""
    module = moved(method)
    h, x = inputs(7)
    before = module(h, x).detach()
    other_h, other_x = inputs(7)
    reads_h = (module(other_h, x) - before).abs().max().item() > 1e-3
    reads_x = (module(h, other_x) - before).abs().max().item() > 1e-3
    constant = method in ("lobireft", "steering", "bitfit")
    assert reads_h == (module.source == "output" and not constant)
    assert reads_x == (module.source == "input")
    assert module.x_size == (X if module.source == "input" else D)


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
    h, x = inputs(7)
    edit = module.to_edit()
    before = edit.delta(h, x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-3)
    assert_close(edit.delta(h, x), before, tolerance=0)


SLOPED_AT_ZERO: list[Activation] = ["identity", "gelu", "silu", "tanh"]
PARALLEL = [
    "parallel_adapter",
    "scaled_parallel_adapter",
    "multi_head_parallel_adapter",
]
START_AT_ZERO: list[tuple[str, Activation]] = [
    ("loreft", "identity"),
    *(("direft", activation) for activation in ACTIVATION_NAMES),
    *(("direft_orthonormal", activation) for activation in SLOPED_AT_ZERO),
    ("red", "identity"),
    ("steering", "identity"),
    ("lora", "identity"),
    ("bitfit", "identity"),
    *((method, activation) for method in PARALLEL for activation in ACTIVATION_NAMES),
]


@pytest.mark.parametrize(("method", "activation"), START_AT_ZERO)
def test_untrained_edits_change_nothing(method: str, activation: Activation) -> None:
    h, x = inputs(50)
    module = fresh(method, 4, activation)
    assert_close(module(h, x).detach(), torch.zeros(50, D))
    assert_close(module.to_edit().delta(h, x), torch.zeros(50, D))


@pytest.mark.parametrize(
    ("method", "activation"), [case for case in CASES if case not in START_AT_ZERO]
)
def test_the_other_untrained_edits_change_something(method: str, activation: Activation) -> None:
    """They cannot start at zero: LoReFT's difference with an activation, sigmoid(0) = ½, and
    relu under an orthonormal R, whose gradient at zero is zero; or, like their reference, do not.
    """
    h, x = inputs(50)
    least = 1e-5 if method == "series_adapter" else 1e-2  # that one starts near zero
    assert fresh(method, 4, activation)(h, x).detach().abs().max() > least


@pytest.mark.parametrize("method", ["loreft", "direft_orthonormal", "consreft"])
@pytest.mark.parametrize("rank", [1, 4, D])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_steps_keep_the_columns_orthonormal(method: str, rank: int, weight_decay: float) -> None:
    """torch's own parametrisation loses R in one AdamW step with weight decay."""
    module = moved(method, rank)
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=weight_decay)
    for _ in range(5):
        train_a_step(module, optimiser)
        up = module.to_edit().up
        assert up is not None
        # A square basis after steps longer than its columns is the worst conditioned.
        assert_close(up @ up.mT, torch.eye(rank))


def test_loreft_edits_within_its_subspace_alone() -> None:
    """Rᵀ(h + Δ(h)) is the trained source; the rest of h is untouched."""
    module = moved("loreft", 4)
    assert isinstance(module, LoReFT)
    h = torch.randn(9, D)
    with torch.no_grad():
        edited, rotation = h + module(h, h), module.rotation()
        source = h @ module.weight.mT + module.bias
        outside = torch.eye(D) - rotation @ rotation.mT
    assert_close(edited @ rotation, source)
    assert_close(edited @ outside, h @ outside)


@every_case
def test_gradients_reach_every_parameter(method: str, activation: Activation) -> None:
    module = moved(method, activation=activation)
    module(*inputs(20)).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_case
def test_an_untrained_module_can_start_to_learn(method: str, activation: Activation) -> None:
    """A start where every gradient is zero would stay there for ever."""
    module = fresh(method, 3, activation)
    losses = []
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.0)
    h, x = inputs(32)
    target = 1 + (h if module.source == "output" else x[:, :D]) / 2
    for _ in range(30):
        optimiser.zero_grad()
        loss = (module(h, x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


NUM_TRAINABLE = {
    "loreft": lambda r: 2 * r * D + r,
    "direft": lambda r: 2 * r * D + r,
    "direft_orthonormal": lambda r: 2 * r * D + r,
    "noreft": lambda r: 2 * r * D + r,
    "consreft": lambda r: r * D + r,
    "interchange": lambda r: r * D,
    "lobireft": lambda r: r * D + r,
    "red": lambda r: 2 * D,
    "steering": lambda r: D,
    "bitfit": lambda r: D,
    "series_adapter": lambda r: 2 * r * D + r + D,
    "parallel_adapter": lambda r: r * X + r * D + r + D,
    "scaled_parallel_adapter": lambda r: r * X + r * D + r + D,
    # Every head reads all of x and writes its own D/H numbers.
    "multi_head_parallel_adapter": lambda r: HEADS * (r * X + r + r * D // HEADS) + D,
    "lora": lambda r: r * X + r * D,
}
"""The papers' counts, for a site X wide at its input and D at its output."""


@every_method
@pytest.mark.parametrize("rank", [1, 3])
def test_num_trainable(method: str, rank: int) -> None:
    module = fresh(method, rank)
    assert module.num_trainable == NUM_TRAINABLE[method](rank)
    next(module.parameters()).requires_grad_(False)
    assert module.num_trainable < NUM_TRAINABLE[method](rank)


@every_method
@pytest.mark.parametrize("rank", [1, 3])
def test_stored_rank(method: str, rank: int) -> None:
    """What the file holds: nothing for constants, every head's rank for heads."""
    factors = dict.fromkeys(("red", "steering", "bitfit", "lobireft"), 0)
    factors["multi_head_parallel_adapter"] = HEADS
    stored = get_method(method).stored_rank(rank, SIZES)
    assert stored == rank * factors.get(method, 1) == fresh(method, rank).to_edit().rank


@pytest.mark.parametrize(("d", "r"), [(1, 1), (8, 3), (8, 8), (64, 16)])
def test_orthonormalise(d: int, r: int) -> None:
    """Orthonormal columns of the same span, at any length of the columns."""
    start = orthonormal_init(d, r)
    assert_close(start.mT @ start, torch.eye(r))
    assert_close(orthonormalise(start), start)
    for factor in (1e-3, 1e3):
        a = torch.randn(d, r) * factor
        q = orthonormalise(a)
        assert_close(q.mT @ q, torch.eye(r))
        assert_close(q @ (q.mT @ a) / factor, a / factor, tolerance=1e-3)


@every_method
def test_every_method_says_what_it_is(method: str) -> None:
    cls = get_method(method)
    assert cls.method == method
    assert cls.equation
    assert cls.citation
    assert cls.source in ("output", "input")
    assert cls.phase in ("prompt", "all")
    assert cls.sites
    assert cls.activations


def test_methods_of_the_reft_family_leave_generated_tokens_alone() -> None:
    """Which decode without hooks is a promise about these."""
    phases = {name: cls.phase for name, cls in METHODS.items()}
    assert {name for name, phase in phases.items() if phase == "prompt"} == {
        "loreft",
        "direft",
        "direft_orthonormal",
        "noreft",
        "consreft",
        "lobireft",
        "red",
        "steering",
        "interchange",
    }


@every_method
def test_an_activation_that_a_method_lacks_breaks_an_invariant(method: str) -> None:
    for activation in set(ACTIVATION_NAMES) - set(get_method(method).activations):
        with pytest.raises(AssertionError, match=f"{method} has no activation {activation}"):
            fresh(method, 3, activation)


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        get_method("loraft")
    assert caught.value.field == "method"
    names = ", ".join(sorted(METHODS))
    assert str(caught.value) == f"method: got 'loraft', expected one of {names}"


@pytest.mark.parametrize("rank", [0, D + 1])
@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.has_rank])
def test_a_rank_outside_the_sites_width_breaks_an_invariant(method: str, rank: int) -> None:
    stored = rank * HEADS if get_method(method).sites == ("heads",) else rank
    with pytest.raises(AssertionError, match=f"rank {stored}"):
        get_method(method)(SIZES, rank)


def test_heads_need_their_size() -> None:
    with pytest.raises(AssertionError, match="size of a head"):
        get_method("multi_head_parallel_adapter")(SiteSizes(D, D), 1)


def test_parts_of_the_edit_have_the_shapes_of_the_algebra() -> None:
    shapes: dict[Part, tuple[int, ...]] = {
        "down": (D, 3),
        "skip": (D, 3),
        "up": (3, D),
        "bias": (3,),
    }
    edit: Edit = moved("loreft", activation="relu").to_edit()
    assert {part: tuple(tensor.shape) for part, tensor in edit.parts()} == shapes
    edit = moved("parallel_adapter").to_edit()
    shapes = {"down": (X, 3), "up": (3, D), "bias": (3,), "shift": (D,)}
    assert {part: tuple(tensor.shape) for part, tensor in edit.parts()} == shapes
