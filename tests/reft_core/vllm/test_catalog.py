"""The adapters of a front end: those that lie in shared places, and those that were loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reft_core.adapter import decode_adapter
from reft_core.errors import AdapterNotFound
from reft_core.vllm.catalog import Catalog
from tests.factories import random_adapter_bytes, tiny_model


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def make(tmp_path: Path, place: Path) -> Any:
    """A catalog with one place."""
    model_config = SimpleNamespace(hf_text_config=tiny_model().config, model="tiny")

    def made(look_interval_s: float = 0) -> Catalog:
        settings = {
            "adapters": [str(place)],
            "look_interval_s": look_interval_s,
            "spool": str(tmp_path / "spool"),
        }
        return Catalog(
            SimpleNamespace(model_config=model_config, additional_config={"reft": settings})
        )

    return made


def file_of(catalog: Catalog, name: str, seed: int = 0) -> tuple[bytes, str]:
    """An adapter's file and its digest."""
    data = random_adapter_bytes(catalog.base, name=name, seed=seed)
    return data, decode_adapter(data).digest


def test_names_follow_the_files_of_a_place(make: Any, place: Path) -> None:
    catalog = make()
    tone, first = file_of(catalog, "tone")
    other, second = file_of(catalog, "tone", seed=1)
    path = place / "a.safetensors"
    path.write_bytes(tone)
    assert (catalog.names(), catalog.resolve("tone")) == ({"tone": first}, first)
    path.write_bytes(other)
    assert catalog.names() == {"tone": second}
    with pytest.raises(AdapterNotFound, match="an adapter that is loaded"):
        catalog.find(first)
    (place / "b.safetensors").write_bytes(tone)
    with pytest.raises(AdapterNotFound, match="2 adapters of this name"):
        catalog.resolve("tone")
    path.unlink()
    assert catalog.resolve("tone") == first
    assert catalog.find(first).digest == first


def test_what_is_loaded_has_its_name_until_it_is_taken_away(make: Any, place: Path) -> None:
    catalog = make()
    data, digest = file_of(catalog, "tone")
    for _ in range(2):
        assert catalog.add(data) == catalog.add(data) == digest
        assert catalog.resolve("tone") == digest
        catalog.remove(digest)
        catalog.remove(digest)
        assert catalog.names() == {}
        with pytest.raises(AdapterNotFound, match="an adapter that is loaded"):
            catalog.find(digest)
    (place / "a.safetensors").write_bytes(data)
    assert catalog.names() == {}, "taken away is taken away"


def test_another_front_ends_adapter_is_found_in_the_spool(make: Any) -> None:
    one, other = make(), make()
    data, digest = file_of(one, "tone")
    one.add(data)
    with pytest.raises(AdapterNotFound):
        other.resolve("tone")
    assert other.find(digest).digest == digest
    assert other.resolve("tone") == digest


def test_a_look_for_one_adapter_learns_of_all(make: Any, place: Path) -> None:
    """Between two looks, an unknown digest is looked for at once."""
    catalog = make(look_interval_s=3600)
    tone, digest = file_of(catalog, "tone")
    (place / "a.safetensors").write_bytes(tone)
    (place / "b.safetensors").write_bytes(file_of(catalog, "voice", seed=1)[0])
    assert catalog.names() == {}
    assert catalog.find(digest).digest == digest
    assert catalog.names().keys() == {"tone", "voice"}
