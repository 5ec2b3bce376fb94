"""Every way a hostile adapter file can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

import reft_core.spec
from reft_core.adapter import MAX_ADAPTER_BYTES, decode_adapter, read_adapter
from reft_core.adapter_header import MAX_HEADER_BYTES
from reft_core.edits import PARTS
from reft_core.errors import AdapterFileInvalid, AdapterTooLarge
from reft_core.spec import HeadSpec, SiteSpec, tensor_name
from tests.factories import (
    make_spec,
    random_adapter,
    random_classifier_bytes,
    random_prefix_adapter,
    tiny_description,
)
from tests.reft_core.adapter_files.bad_files import BAD_FILES, Bad
from tests.reft_core.adapter_files.damage import (
    DOWN,
    UP,
    good_file,
    pack,
    swap_offsets,
    unpack,
    with_spec,
)


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.name)
def test_bad_files_are_refused_with_a_reason(bad: Bad) -> None:
    with pytest.raises(AdapterFileInvalid) as caught:
        decode_adapter(bad.file())
    message = str(caught.value)
    missing = [fragment for fragment in bad.says if fragment not in message]
    assert not missing, message
    assert caught.value.field, message


def test_the_good_file_is_good() -> None:
    """Else every refusal above would prove nothing."""
    header, data = unpack(good_file())
    assert decode_adapter(pack(header, data)).spec == decode_adapter(good_file()).spec
    swapped = decode_adapter(swap_offsets(DOWN, UP))
    assert swapped.digest != decode_adapter(good_file()).digest, "equal sizes stay consistent"


@pytest.mark.parametrize("key", ["x" * 100_000, "line\nbreak \x1b[31m"])
def test_messages_neither_flood_nor_forge_a_log(key: str) -> None:
    """A hostile key reaches messages shortened and escaped, as values do."""
    with pytest.raises(AdapterFileInvalid) as caught:
        decode_adapter(with_spec(key, value=1))
    for text in (str(caught.value), caught.value.field or ""):
        assert len(text) < 500
        assert text.isprintable()


def test_a_spec_that_implies_millions_of_tensors_costs_what_its_header_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = replace(tiny_description(), num_layers=1024)
    site = SiteSpec(layers=tuple(range(1024)), rank=1, parts=PARTS)
    spec = make_spec(model, positions="f1+l1", tied=False).model_copy(
        update={"sites": {f"linear:m{i}": site for i in range(150)}}
    )
    assert spec.num_tensors == 150 * 1024 * 6 * 2
    named = 0

    def counted(*where: Any) -> str:
        nonlocal named
        named += 1
        return tensor_name(*where)

    monkeypatch.setattr(reft_core.spec, "tensor_name", counted)
    header = json.dumps({"__metadata__": {"reft": spec.to_json()}}).encode()
    assert len(header) < MAX_HEADER_BYTES
    with pytest.raises(AdapterFileInvalid, match=r"layers\.0\.linear:m0\.0\.down: missing"):
        decode_adapter(pack(header, b""))
    assert named == 1


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_tensors_are_counted_as_they_are_named(kind: Literal["kv", "embedding"]) -> None:
    model = tiny_description()
    heads = [HeadSpec(), HeadSpec(hidden=5, activation="tanh")]
    adapters = [
        random_prefix_adapter(model, kind),
        random_adapter(model, positions="f1+l1", tied=False),
        *(decode_adapter(random_classifier_bytes(model, 3, head)) for head in heads),
    ]
    for adapter in adapters:
        assert adapter.spec.num_tensors == len(adapter.spec.tensor_shapes())


def test_size_is_capped_before_anything_is_read() -> None:
    file = good_file()
    assert decode_adapter(file, max_bytes=len(file)).num_bytes == len(file)
    with pytest.raises(AdapterTooLarge) as caught:
        decode_adapter(file, max_bytes=len(file) - 1)
    assert f"{len(file)} bytes" in str(caught.value)
    assert f"at most {len(file) - 1} bytes" in str(caught.value)
    assert caught.value.field == "body"


def test_a_file_over_the_cap_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file: reading its terabyte would end the test in another way."""
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterTooLarge) as caught:
        read_adapter(path)
    assert f"{2**40} bytes" in str(caught.value)
    assert f"at most {MAX_ADAPTER_BYTES} bytes" in str(caught.value)


def test_read_adapter_is_decode_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(good_file())
    assert read_adapter(path).digest == decode_adapter(good_file()).digest
    with pytest.raises(AdapterTooLarge):
        read_adapter(path, max_bytes=len(good_file()) - 1)
    with pytest.raises(FileNotFoundError):
        read_adapter(tmp_path / "absent.safetensors")
