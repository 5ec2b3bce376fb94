"""An adapter fits the model whose shape it was made for, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reft_core.adapter import check_fits, decode_adapter
from reft_core.errors import AdapterMismatch
from reft_core.spec import PrefixSpec
from tests.factories import make_spec, random_prefix_adapter, tiny_description
from tests.reft_core.adapter_files.damage import good_file

NARROWING = "linear:mlp.down_proj"  # 48 → 32
WIDENING = "linear:mlp.up_proj"  # 32 → 48


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "mamba"),
        ("hidden_size", 64),
        ("num_layers", 5),
        ("vocab_size", 97),
        ("fingerprint", "0" * 64),
    ],
)
def test_an_adapter_of_another_model_does_not_fit(field: str, value: object) -> None:
    model = tiny_description()
    spec = decode_adapter(good_file()).spec
    check_fits(spec, model)
    other = spec.model_copy(update={"base": spec.base.model_copy(update={field: value})})
    with pytest.raises(AdapterMismatch) as caught:
        check_fits(other, model)
    assert caught.value.field == f"base.{field}"
    assert str(caught.value).startswith(
        f"base.{field}: got {value!r}, expected {getattr(model, field)!r}"
    )
    assert model.name in str(caught.value)


def test_the_name_of_the_base_model_is_for_people() -> None:
    spec = decode_adapter(good_file()).spec
    renamed = spec.model_copy(update={"base": spec.base.model_copy(update={"name": "a copy"})})
    check_fits(renamed, tiny_description())
    with pytest.raises(AdapterMismatch):
        check_fits(renamed, replace(tiny_description(), hidden_size=33))


@pytest.mark.parametrize(
    ("site", "problem"),
    [
        ("linear:mlp.nope", "sites: got 'linear:mlp.nope', expected one of block_output, "),
        (NARROWING, f"sites.{NARROWING} sizes: got (32, 32), expected (48, 32), as in tiny-llama"),
        (WIDENING, f"sites.{WIDENING} sizes: got (32, 32), expected (32, 48), as in tiny-llama"),
    ],
)
def test_an_adapter_of_other_sites_does_not_fit(site: str, problem: str) -> None:
    """Sites that the model lacks, or has in another width."""
    model = tiny_description()
    spec = make_spec(model)
    moved = spec.model_copy(update={"sites": {site: spec.sites["block_output"]}})
    with pytest.raises(AdapterMismatch) as caught:
        check_fits(moved, model)
    assert caught.value.field == f"sites.{site}"
    assert str(caught.value).startswith(problem)
    right = make_spec(model, sites=(NARROWING, WIDENING))
    check_fits(right, model)


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (2, 16), (2, 7)])
def test_a_prefix_of_other_heads_does_not_fit(heads: int, head_dim: int) -> None:
    model = tiny_description()
    spec = random_prefix_adapter(model, "kv").spec
    check_fits(spec, model)
    prefix = PrefixSpec(kind="kv", length=3, num_kv_heads=heads, head_dim=head_dim)
    with pytest.raises(AdapterMismatch) as caught:
        check_fits(spec.model_copy(update={"prefix": prefix}), model)
    assert caught.value.field == "prefix"
    assert str(caught.value) == (
        f"prefix heads: got ({heads}, {head_dim}), expected (2, 8), as in tiny-llama"
    )
