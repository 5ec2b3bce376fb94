"""Finds the layers of every family; the fingerprint; hooks that replace an output."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from reft_core.errors import UnsupportedModel
from reft_core.sites import describe_model, edit_site, find_layers, fingerprint, site_sizes
from tests.factories import (
    FAMILIES,
    HIDDEN_SIZE,
    NUM_LAYERS,
    VOCAB_SIZE,
    assert_close,
    tiny_model,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_order(family: str) -> None:
    """Each takes the residual stream the one before it returned."""
    model = tiny_model(family)
    layers = find_layers(model)
    assert len(layers) == NUM_LAYERS
    ran: list[tuple[int, Tensor, Tensor]] = []

    def spy(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            ran.append((index, hidden, output[0] if isinstance(output, tuple) else output))

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_hook(spy(index), with_kwargs=True)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert [index for index, _, _ in ran] == list(range(NUM_LAYERS))
    for (_, _, before), (_, after, _) in itertools.pairwise(ran):
        assert before.shape == (1, 3, HIDDEN_SIZE)
        assert_close(after, before, tolerance=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_description(family: str) -> None:
    model = tiny_model(family)
    found = describe_model(model, "some/name")
    assert found.name == "some/name"
    assert found.architecture == model.config.model_type
    assert (found.hidden_size, found.num_layers) == (HIDDEN_SIZE, NUM_LAYERS)
    assert (found.vocab_size, found.max_positions) == (VOCAB_SIZE, 256)
    assert found.num_kv_heads == (4 if family in ("gpt2", "gpt_neox") else 2)
    assert found.head_dim == 8
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert len(found.fingerprint) == 64
    assert found.sites == site_sizes(find_layers(model)[0], HIDDEN_SIZE)
    base = found.to_base_spec()
    assert {name: getattr(found, name) for name in type(base).model_fields} == base.model_dump()


def test_every_family_has_its_own_fingerprint() -> None:
    found = {fingerprint(tiny_model(family).config) for family in FAMILIES}
    assert len(found) == len(FAMILIES)


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1.0000001e-6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.001}},
        {"attention_dropout": 0.1},
        {"max_position_embeddings": 8192},
        {"eos_token_id": 5},
        {"dtype": "bfloat16"},
    ],
)
def test_fingerprint_ignores_what_gives_no_shape(change: dict[str, Any]) -> None:
    assert fingerprint(LlamaConfig(**SHAPE, **change)) == fingerprint(LlamaConfig(**SHAPE))


@pytest.mark.parametrize("field", SHAPE)
def test_fingerprint_feels_every_shape(field: str) -> None:
    other = LlamaConfig(**SHAPE | {field: SHAPE[field] * 2})
    assert fingerprint(other) != fingerprint(LlamaConfig(**SHAPE))


def test_fingerprint_takes_defaults_as_their_values() -> None:
    """A config that leaves out what follows from the rest is the same model."""
    spelt = SHAPE | {"num_key_value_heads": 4}
    short = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "head_dim")}
    assert fingerprint(LlamaConfig(**spelt)) == fingerprint(LlamaConfig(**short))


class Parts(PreTrainedModel):
    """Any module tree under a llama config of two layers."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(LlamaConfig(**SHAPE | {"num_hidden_layers": 2}))
        for name, child in children.items():
            self.add_module(name, child)


def stack(*sizes: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(size, size) for size in sizes)


class Nested(nn.Module):
    """A layer that has as many parts of its own as the model has layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = stack(2, 2)


@pytest.mark.parametrize(
    "children",
    [
        {"layers": stack(2, 2)},
        {"layers": stack(2, 2), "heads": stack(2, 2, 2)},
        {"layers": stack(2, 2), "dropouts": nn.ModuleList([nn.Dropout(), nn.Dropout()])},
        {"layers": stack(2, 2), "mixed": nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])},
        {"layers": nn.ModuleList([Nested(), Nested()])},
    ],
)
def test_the_one_fitting_list_is_taken(children: dict[str, nn.Module]) -> None:
    layers = children["layers"]
    assert isinstance(layers, nn.ModuleList)
    assert find_layers(Parts(**children)) == list(layers)


@pytest.mark.parametrize(
    ("children", "problem"),
    [
        ({}, "found none; its lists are: none"),
        ({"body": stack(2, 2, 2)}, "found none; its lists are: body (3 members)"),
        (
            {"mixed": nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])},
            "found none; its lists are: mixed (2 members)",
        ),
        (
            {"encoder": stack(2, 2), "decoder": stack(2, 2), "extra": stack(2)},
            "found 2; its lists are: encoder (2 members), decoder (2 members), extra (1 members)",
        ),
    ],
)
def test_other_structures_are_refused(children: dict[str, nn.Module], problem: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        find_layers(Parts(**children))
    assert str(caught.value) == (
        "Parts: looked for one ModuleList of 2 alike layers (the config's num_hidden_layers), "
        + problem
    )


class Layer(nn.Module):
    """Returns its input, alone or first in a tuple."""

    def __init__(self, extra: tuple[object, ...] | None) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, hidden_states: Tensor) -> Any:
        return hidden_states if self.extra is None else (hidden_states, *self.extra)


@pytest.mark.parametrize("extra", [None, (), ("cache",), ("cache", None)])
@pytest.mark.parametrize("by_name", [False, True])
def test_edit_site_replaces_the_hidden_states_alone(
    extra: tuple[object, ...] | None, by_name: bool
) -> None:
    layer = Layer(extra)
    hidden_states = torch.randn(1, 3, 4)

    def call() -> Any:
        return layer(hidden_states=hidden_states) if by_name else layer(hidden_states)

    handle = edit_site(layer, "block_output", lambda h, x: h + 2 * x + 1)
    output = call()
    if extra is None:
        assert_close(output, 3 * hidden_states + 1)
    else:
        assert_close(output[0], 3 * hidden_states + 1)
        assert output[1:] == extra
    handle.remove()
    restored = call()
    assert (restored if extra is None else restored[0]) is hidden_states


def test_edits_of_one_layer_stack_in_order() -> None:
    layer = Layer(None)
    edit_site(layer, "block_output", lambda h, x: h + 1)
    doubling = edit_site(layer, "block_output", lambda h, x: h * 2)
    assert_close(layer(torch.ones(1, 1, 1)), torch.full((1, 1, 1), 4.0), tolerance=0)
    doubling.remove()
    assert_close(layer(torch.ones(1, 1, 1)), torch.full((1, 1, 1), 2.0), tolerance=0)


# Sites of every family --------------------------------------------------------------------

_GATED = {"mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32)}
_GROUPED = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    **_GATED,
}
LINEARS = dict.fromkeys(FAMILIES, _GROUPED) | {
    "gpt2": {
        "attn.c_attn": (32, 96),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (32, 128),
        "mlp.c_proj": (128, 32),
    },
    "gpt_neox": {
        "attention.query_key_value": (32, 96),
        "attention.dense": (32, 32),
        "mlp.dense_h_to_4h": (32, 48),
        "mlp.dense_4h_to_h": (48, 32),
    },
}
RESIDUAL = ("block_output", "attn_output", "mlp_output", "heads")
CASES = [
    (family, site)
    for family in FAMILIES
    for site in (*RESIDUAL, *(f"linear:{name}" for name in LINEARS[family]))
]
every_site = pytest.mark.parametrize(("family", "site"), CASES)
TOKENS = torch.tensor([[5, 6, 7, 8, 9]])
AT = 2
"""The layer that these tests edit."""


def attention_of(family: str) -> str:
    return next(iter(LINEARS[family])).split(".")[0]


def output_projection(family: str) -> str:
    prefix = f"{attention_of(family)}."
    return [name for name in LINEARS[family] if name.startswith(prefix)][-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_and_their_sizes(family: str) -> None:
    linears = {f"linear:{name}": sizes for name, sizes in LINEARS[family].items()}
    expected = dict.fromkeys(RESIDUAL, (HIDDEN_SIZE, HIDDEN_SIZE)) | linears
    for layer in find_layers(tiny_model(family)):
        assert site_sizes(layer, HIDDEN_SIZE) == expected


def test_heads_may_be_wider_than_the_hidden_states() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"head_dim": 16}))
    sites = describe_model(model, "wide").sites
    assert sites["heads"] == (32, 64)
    assert sites["attn_output"] == (32, 32)
    assert sites["linear:self_attn.o_proj"] == (64, 32)


def test_a_layer_without_attention_lacks_its_sites() -> None:
    """As a state-space layer does; and one with two feed-forwards has no one MLP."""
    plain = nn.ModuleDict({"mixer": nn.Linear(4, 4)})
    assert site_sizes(plain, 4) == {"block_output": (4, 4), "linear:mixer": (4, 4)}
    layer = find_layers(tiny_model())[0]
    layer.add_module("second", nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)))
    assert "mlp_output" not in site_sizes(layer, 32)
    assert "attn_output" in site_sizes(layer, 32)
    with pytest.raises(AssertionError, match="has no mlp_output"):
        edit_site(layer, "mlp_output", lambda h, x: h)
    for site in ("attn_output", "heads"):
        with pytest.raises(AssertionError, match="ModuleDict has no"):
            edit_site(plain, site, lambda h, x: h)


def seen_at(model: PreTrainedModel, site: str) -> tuple[Tensor, Tensor]:
    """h and x of a site in layer AT, in one forward that it does not change."""
    seen: list[tuple[Tensor, Tensor]] = []

    def edit(h: Tensor, x: Tensor) -> Tensor:
        seen.append((h.clone(), x.clone()))
        return h

    handle = edit_site(find_layers(model)[AT], site, edit)
    model(input_ids=TOKENS)
    handle.remove()
    ((h, x),) = seen
    return h, x


@every_site
def test_h_and_x_have_the_sites_widths(family: str, site: str) -> None:
    model = tiny_model(family)
    h, x = seen_at(model, site)
    in_size, out_size = site_sizes(find_layers(model)[AT], HIDDEN_SIZE)[site]
    assert h.shape == (1, 5, out_size)
    assert x.shape == (1, 5, in_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_h_and_x_are_what_the_model_computes(family: str) -> None:
    """Each module, called again on x, gives h; what one site puts out the next takes in."""
    model = tiny_model(family)
    states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    layer = find_layers(model)[AT]

    h, x = seen_at(model, "block_output")
    assert_close(h, states[AT + 1])
    assert_close(x, states[AT])

    for name in LINEARS[family]:
        h, x = seen_at(model, f"linear:{name}")
        assert_close(layer.get_submodule(name)(x), h)

    h, x = seen_at(model, "mlp_output")
    assert_close(layer.get_submodule("mlp")(x), h)

    first = next(iter(LINEARS[family]))
    attention_input = seen_at(model, f"linear:{first}")[1]
    projection = output_projection(family)
    attn_output, attn_input = seen_at(model, "attn_output")
    assert_close(attn_input, attention_input)
    assert_close(attn_output, seen_at(model, f"linear:{projection}")[0])

    h, x = seen_at(model, "heads")
    assert_close(x, attention_input)
    assert_close(layer.get_submodule(projection)(h), attn_output)


@every_site
def test_the_replacement_reaches_the_logits_and_leaves_with_its_handle(
    family: str, site: str
) -> None:
    """Replaced by itself: no bit changes. Replaced at one token: no earlier one feels it."""
    model = tiny_model(family)
    layer = find_layers(model)[AT]
    before = model(input_ids=TOKENS).logits

    def push(h: Tensor, x: Tensor) -> Tensor:
        h = h.clone()
        # Not a constant, which a layer norm would take out again.
        h[:, 3] += torch.linspace(-1, 2, h.shape[-1]) + x[:, 3].mean()
        return h

    handle = edit_site(layer, site, lambda h, x: h.clone())
    assert_close(model(input_ids=TOKENS).logits, before, tolerance=0)
    handle.remove()
    handle = edit_site(layer, site, push)
    for _ in range(2):  # an edit keeps nothing from one forward to the next
        after = model(input_ids=TOKENS).logits
        assert_close(after[:, :3], before[:, :3], tolerance=0)
        assert (after[:, 3:] - before[:, 3:]).abs().max() > 1e-3
    handle.remove()
    assert_close(model(input_ids=TOKENS).logits, before, tolerance=0)
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    assert sum(hooks) == 0
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_can_be_edited_at_once(family: str) -> None:
    """Each edit still sees its own site, with what those before it wrote."""
    model = tiny_model(family)
    layer = find_layers(model)[AT]
    calls: list[str] = []

    def edit(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def note(h: Tensor, x: Tensor) -> Tensor:
            calls.append(name)
            return h + 0.01

        return note

    sites = site_sizes(layer, HIDDEN_SIZE)
    handles = [edit_site(layer, site, edit(site)) for site in sites]
    model(input_ids=TOKENS)
    assert sorted(calls) == sorted(sites)
    assert calls[-1] == "block_output"
    assert calls.index("heads") < calls.index(f"linear:{output_projection(family)}")
    for handle in handles:
        handle.remove()
    calls.clear()
    model(input_ids=TOKENS)
    assert calls == []


def test_a_failed_forward_leaves_nothing_for_the_next() -> None:
    """The heads' edit takes x from the attention's start; a stale one must not be used."""
    model = tiny_model()
    layer = find_layers(model)[AT]
    expected = seen_at(model, "heads")
    seen: list[Tensor] = []

    def edit(h: Tensor, x: Tensor) -> Tensor:
        seen.append(x.clone())
        return h

    handle = edit_site(layer, "heads", edit)
    projection = layer.get_submodule("self_attn.v_proj")

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    failing = projection.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(input_ids=torch.tensor([[50, 51]]))
    failing.remove()
    model(input_ids=TOKENS)
    handle.remove()
    (x,) = seen
    assert_close(x, expected[1], tolerance=0)
