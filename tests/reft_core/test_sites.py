"""Finds the layers of every family; the fingerprint; hooks that replace an output."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from reft_core.errors import UnsupportedModel
from reft_core.sites import describe_model, edit_output, find_layers, fingerprint
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

    def forward(self, h: Tensor) -> Any:
        return h if self.extra is None else (h, *self.extra)


@pytest.mark.parametrize("extra", [None, (), ("cache",), ("cache", None)])
def test_edit_output_replaces_the_hidden_states_alone(extra: tuple[object, ...] | None) -> None:
    layer = Layer(extra)
    h = torch.randn(1, 3, 4)
    handle = edit_output(layer, lambda hidden: hidden + 1)
    output = layer(h)
    if extra is None:
        assert_close(output, h + 1, tolerance=0)
    else:
        assert_close(output[0], h + 1, tolerance=0)
        assert output[1:] == extra
    handle.remove()
    restored = layer(h)
    assert (restored if extra is None else restored[0]) is h


def test_edits_of_one_layer_stack_in_order() -> None:
    layer = Layer(None)
    edit_output(layer, lambda hidden: hidden + 1)
    doubling = edit_output(layer, lambda hidden: hidden * 2)
    assert_close(layer(torch.ones(1, 1, 1)), torch.full((1, 1, 1), 4.0), tolerance=0)
    doubling.remove()
    assert_close(layer(torch.ones(1, 1, 1)), torch.full((1, 1, 1), 2.0), tolerance=0)
