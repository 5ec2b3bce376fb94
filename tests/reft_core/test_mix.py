"""A mixed adapter equals the stack it was mixed from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_core.adapter import Adapter, decode_adapter
from reft_core.errors import AdapterFileInvalid, InvalidRequest
from reft_core.mix import MIXED, Ingredient, mix
from reft_core.spec import HeadSpec
from tests.factories import (
    random_adapter,
    random_classifier_bytes,
    random_prefix_adapter,
    random_prompt,
    tiny_description,
    tiny_model,
)
from tests.reference.slow import reference_logits

LINEAR = ("linear:mlp.up_proj",)


def made(method: str, seed: int, **options: object) -> Adapter:
    return random_adapter(
        tiny_description(), method=method, name=f"{method}-{seed}", seed=seed, size=0.7, **options
    )


def assert_equals_stack(stack: list[tuple[Adapter, float]], length: int = 9) -> Adapter:
    mixed = decode_adapter(mix([Ingredient(*part) for part in stack], "mixed"))
    model = tiny_model()
    tokens = list(random_prompt(length + 3, seed=3))
    stacked = reference_logits(model, tokens, length, stack=stack)
    once = reference_logits(model, tokens, length, mixed)
    assert (stacked - reference_logits(model, tokens, length)).abs().max() > 0.1
    torch.testing.assert_close(once, stacked, atol=1e-4, rtol=1e-4)
    return mixed


AFFINE = ["loreft", "direft", "red", "steering"]


@pytest.mark.parametrize("second", AFFINE)
@pytest.mark.parametrize("first", AFFINE)
def test_affine_edits_of_the_output_compose(first: str, second: str) -> None:
    stack = [(made(first, 1, positions="f1+l2"), 0.7), (made(second, 2, positions="f1+l2"), -0.5)]
    assert_equals_stack(stack)


def test_three_at_different_layers_and_ranks() -> None:
    stack = [
        (made("loreft", 1, rank=1, layers=[0, 1]), 1.0),
        (made("loreft", 2, rank=3, layers=[1, 2]), 0.5),
        (made("loreft", 3, rank=2, layers=[1, 3]), 2.0),
    ]
    mixed = assert_equals_stack(stack)
    assert mixed.spec.sites["block_output"].rank == 6
    assert mixed.spec.method == "loreft"


def test_untied_units_mix_unit_by_unit() -> None:
    rule = {"positions": "f2+l2", "tied": False}
    assert_equals_stack([(made("loreft", 1, **rule), 1.0), (made("direft", 2, **rule), 1.0)])


def test_edits_of_the_input_add_up() -> None:
    loras = [made("lora", seed, sites=LINEAR, positions="prompt") for seed in (1, 2)]
    mixed = assert_equals_stack([(loras[0], 0.7), (loras[1], 1.5)])
    assert mixed.spec.sites[LINEAR[0]].phase == "all"


def test_non_linear_edits_of_the_input_add_up() -> None:
    pair = [made("parallel_adapter", seed, positions="prompt") for seed in (1, 2)]
    assert_equals_stack([(pair[0], 0.7), (pair[1], 1.5)])


def test_methods_at_different_sites() -> None:
    stack = [
        (made("series_adapter", 1, positions="prompt"), 0.5),
        (made("lora", 2, sites=LINEAR, positions="prompt"), 1.0),
    ]
    assert assert_equals_stack(stack).spec.method == MIXED


def test_a_prefix_comes_along() -> None:
    prefix = random_prefix_adapter(tiny_description(), "kv")
    lora = made("lora", 2, sites=LINEAR, positions=prefix.spec.positions.rule)
    mixed = assert_equals_stack([(prefix, 1.0), (lora, 0.5)])
    assert mixed.num_virtual_tokens == prefix.num_virtual_tokens


def test_a_prefix_at_strength_0_stays_out() -> None:
    prefix = random_prefix_adapter(tiny_description(), "kv")
    lora = made("lora", 2, sites=LINEAR, positions=prefix.spec.positions.rule)
    assert assert_equals_stack([(prefix, 0.0), (lora, 0.5)]).prefix is None
    with pytest.raises(InvalidRequest, match=r"strength: got 0\.5, expected 0 or 1"):
        mix([Ingredient(prefix, 0.5), Ingredient(lora, 1.0)], "mixed")


def test_the_file_says_what_it_was_mixed_from() -> None:
    first, second = made("loreft", 1), made("loreft", 2)
    spec = decode_adapter(mix([Ingredient(first, 0.7), Ingredient(second, 0.5)], "both")).spec
    assert spec.name == "both"
    assert spec.description == "Mixed from loreft-1 at 0.7, loreft-2 at 0.5"
    assert spec.training.data == {
        "adapter_1": f"loreft-1@sha256:{first.digest}",
        "adapter_2": f"loreft-2@sha256:{second.digest}",
    }


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"positions": "l2"}, "positions: got"),
        ({"method": "series_adapter"}, {"method": "series_adapter"}, "layers"),
        ({"method": "noreft", "activation": "relu"}, {}, "activation: got"),
        ({"method": "interchange"}, {}, "interchange: got True"),
        ({"rank": 20}, {"rank": 20}, "rank: got 40, expected at most 32"),
    ],
)
def test_what_cannot_be_mixed_is_refused(first: dict, second: dict, message: str) -> None:
    pair = [
        made(options.pop("method", "loreft"), seed, **({"positions": "prompt"} | options))
        for seed, options in enumerate((dict(first), dict(second)))
    ]
    with pytest.raises(InvalidRequest, match=message):
        mix([Ingredient(adapter, 1.0) for adapter in pair], "mixed")


def test_one_adapter_is_no_mix() -> None:
    with pytest.raises(InvalidRequest, match="at least 2"):
        mix([Ingredient(made("loreft", 1), 1.0)], "mixed")


def test_a_bad_name_is_refused() -> None:
    pair = [Ingredient(made("loreft", seed), 1.0) for seed in (1, 2)]
    with pytest.raises(AdapterFileInvalid, match=r"spec\.name"):
        mix(pair, "no spaces, please")


def test_heads_are_refused() -> None:
    data = random_classifier_bytes(tiny_description(), 2, HeadSpec(), positions="l1")
    pair = [Ingredient(made("loreft", 1), 1.0), Ingredient(decode_adapter(data), 1.0)]
    with pytest.raises(InvalidRequest, match="none with a head"):
        mix(pair, "mixed")


def test_subspaces_are_refused_and_not_lost() -> None:
    named = made("loreft", 1, subspaces={"tone": (0,), "topic": (1,)})
    for pair in ([named, made("loreft", 2)], [made("loreft", 2), named]):
        with pytest.raises(InvalidRequest, match=r"got 'loreft-1', .*subspaces \(tone, topic\)"):
            mix([Ingredient(adapter, 1.0) for adapter in pair], "mixed")


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("", ""), ""),
        (("MIT", "MIT"), "MIT"),
        (("MIT", "Apache-2.0"), "MIT AND Apache-2.0"),
        (("", "MIT"), "NOASSERTION AND MIT"),
    ],
)
def test_a_mix_is_under_the_licences_of_all_its_parts(
    licences: tuple[str, ...], expected: str
) -> None:
    parts = []
    for seed, licence in enumerate(licences):
        adapter = made("loreft", seed)
        spec = adapter.spec.model_copy(update={"licence": licence})
        parts.append(Ingredient(replace(adapter, spec=spec), 1.0))
    assert decode_adapter(mix(parts, "mixed")).spec.licence == expected
