"""The sizes that docs/scaling.md has, against an adapter's own tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.adapter_sizes import Shape, Split, splits, table
from benchmarks.work import fresh_adapter
from reft_core.convert.base import base_from_folder
from reft_core.loading import DEMO_MODEL
from reft_core.spec import PositionSpec

PAGE = Path(__file__).parents[2] / "docs/scaling.md"


@pytest.mark.parametrize(("tied", "num_units"), [(True, 1), (False, 2)])
def test_an_adapter_is_as_large_as_the_formula_says(tied: bool, num_units: int) -> None:
    model = base_from_folder(DEMO_MODEL)
    layers = range(2)
    spec = PositionSpec(rule="f7+l7", tied=tied)
    _, modules = fresh_adapter(model, "loreft", spec, layers=layers, rank=4)
    numbers = sum(module.to_edit().num_parameters for module in modules.values())
    shape = Shape("", model.hidden_size, len(layers), model.num_kv_heads, model.head_dim)
    assert shape.adapter_bytes(4, num_units) == 4 * numbers


def test_keys_and_values_are_those_of_the_demo_model() -> None:
    assert Shape("", 576, 30, 3, 64).kv_bytes == 46_080 // 2  # docs/operations.md has float32


def test_ranks_share_layers_but_not_an_adapter() -> None:
    shape = Shape("", hidden_size=1000, num_layers=8, num_kv_heads=1, head_dim=1)
    alone, wide, long = (Split(shape, 1e9, *gpus) for gpus in ((1, 1), (4, 1), (1, 4)))
    assert alone.num_adapters(4) == wide.num_adapters(4) == long.num_adapters(4) // 4
    assert alone.weights_gib == 4 * wide.weights_gib == 4 * long.weights_gib


def test_the_page_has_the_tables() -> None:
    text = PAGE.read_text()
    assert table() in text
    assert splits() in text
