from __future__ import annotations

import pytest

from reft_core.describe import describe_adapter, describe_method, formula
from reft_core.errors import InvalidRequest
from reft_core.methods import METHODS
from reft_core.methods.placement import Placement
from reft_core.spec import PrefixSpec, SiteSpec
from tests.factories import make_spec, tiny_description


# Rows of table 1 in arXiv 2110.04366: insertion form and the start of the composition.
@pytest.mark.parametrize(
    ("method", "insertion", "composition"),
    [
        ("prefix_tuning", "parallel", "h ← (1 − λ"),
        ("series_adapter", "sequential", "h ← h + Δ"),
        ("lora", "parallel", "h ← h + Δ"),
        ("parallel_adapter", "parallel", "h ← h + Δ"),
        ("multi_head_parallel_adapter", "parallel", "h ← h + Δ"),
        ("scaled_parallel_adapter", "parallel", "h ← h + Δ"),
    ],
)
def test_the_papers_table(method: str, insertion: str, composition: str) -> None:
    (axes,) = describe_method(method)
    assert axes.insertion == insertion
    assert axes.composition.startswith(composition)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_every_axis(method: str) -> None:
    (axes,) = describe_method(method)
    assert all(text for _, text in axes.lines())
    assert axes.form == METHODS[method].equation
    assert ("generated" in axes.scope) == (METHODS[method].phase == "all")


def test_mam_is_a_prefix_and_a_scaled_parallel_adapter() -> None:
    prefix, adapter = describe_method("mam")
    assert [prefix] == describe_method("prefix_tuning")
    assert [adapter] == describe_method("scaled_parallel_adapter")
    assert "FFN" in adapter.representation


def test_constants_are_not_sequential() -> None:
    assert describe_method("steering")[0].insertion.startswith("none")
    assert describe_method("bitfit")[0].insertion.startswith("none")


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"method: got 'ia3'.*mam"):
        describe_method("ia3")


def test_an_adapter_is_described_site_by_site() -> None:
    model = tiny_description()
    placement = Placement.on(model, "scaled_parallel_adapter", layers=(0, 2), rank=2)
    spec = make_spec(model, placement=placement, prefix=PrefixSpec(kind="embedding", length=3))
    (first, prefix), (second, site) = describe_adapter(spec)
    assert (first, second) == ("prefix of 3", "mlp_output")
    assert prefix.insertion == "parallel"
    assert site.representation == "the FFN's output, layers 0, 2"
    assert site.form == "(relu(x·down + bias))·up [rank 2] + shift"


def test_the_formula_has_the_terms_that_are_there() -> None:
    folded = SiteSpec(layers=(0,), rank=4, parts=("down", "up", "bias"))
    assert formula(folded) == "(h·down + bias)·up [rank 4]"
    full = SiteSpec(layers=(0,), rank=4, parts=("down", "skip", "up"), activation="gelu", scale=0.5)
    assert formula(full) == "0.5·(gelu(h·down) − h·skip)·up [rank 4]"
    assert formula(SiteSpec(layers=(0,), rank=0, parts=("shift", "gain"))) == "shift + gain∘h"
