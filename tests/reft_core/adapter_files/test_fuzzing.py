"""Damage drawn at random: an adapter file is refused, or all it promises is kept."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_core.adapter import Adapter, EditKey, decode_adapter
from reft_core.errors import AdapterFileInvalid
from reft_core.spec import AdapterSpec, SiteSpec
from tests.factories import HIDDEN_SIZE
from tests.reft_core.adapter_files.damage import good_file, with_spec


def assert_valid(adapter: Adapter, file: bytes) -> None:
    """Whatever was accepted keeps every promise of a decoded adapter."""
    assert adapter.digest == hashlib.sha256(file).hexdigest()
    assert AdapterSpec.model_validate_json(adapter.spec.to_json()) == adapter.spec
    site = adapter.spec.sites["block_output"]
    units = range(adapter.rule.num_units)
    assert set(adapter.edits) == {
        EditKey(layer, "block_output", unit) for layer in site.layers for unit in units
    }
    for edit in adapter.edits.values():
        assert all(tensor.isfinite().all() for _, tensor in edit.parts())
        x = torch.zeros(1, site.sizes(adapter.spec.base.hidden_size)[0])
        h = torch.zeros(1, site.sizes(adapter.spec.base.hidden_size)[1])
        assert edit.delta(h, x).shape == h.shape == (1, HIDDEN_SIZE)


def decode_or_refuse(file: bytes) -> None:
    try:
        adapter = decode_adapter(file, max_bytes=1 << 20)
    except AdapterFileInvalid:  # AdapterTooLarge is one
        return
    assert_valid(adapter, file)


HEADER_END = 8 + struct.unpack("<Q", good_file()[:8])[0]
places = st.integers(0, 7) | st.integers(8, HEADER_END - 1) | st.integers(0, len(good_file()) - 1)


@given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_are_refused_or_harmless(changes: list[tuple[int, int]]) -> None:
    file = bytearray(good_file())
    for place, value in changes:
        file[place] = value
    decode_or_refuse(bytes(file))


@given(places, st.integers(0, 40), st.binary(max_size=40))
def test_spliced_bytes_are_refused_or_harmless(place: int, cut: int, added: bytes) -> None:
    file = good_file()
    decode_or_refuse(file[:place] + added + file[place + cut :])


SPEC_PATHS = [
    *((key,) for key in AdapterSpec.model_fields),
    *(("base", key) for key in ("name", "hidden_size", "num_layers", "fingerprint")),
    *(("positions", key) for key in ("rule", "tied", "anchor")),
    *(("sites", "block_output", key) for key in SiteSpec.model_fields),
    *(("training", key) for key in ("seed", "data", "hyperparameters", "metrics")),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(SPEC_PATHS), json_values)
def test_any_json_in_the_spec_is_refused_or_harmless(path: tuple[str, ...], value: Any) -> None:
    decode_or_refuse(with_spec(*path, value=value))
