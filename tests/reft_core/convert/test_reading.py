"""What meets hostile folders and files: sizes, counts, and tensors that are none."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reft_core.convert import reading, tensor_file
from reft_core.convert.reading import list_folder, read_json
from reft_core.convert.tensor_file import TensorFile, read_pickle
from reft_core.errors import AdapterFileInvalid, AdapterTooLarge


def test_a_file_over_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{" + " " * 10 + "}")
    with pytest.raises(AdapterTooLarge, match=r"config\.json: got '12 bytes', expected at most 10"):
        read_json(path, max_bytes=10)
    path.write_text("{" + " " * reading.MAX_CONFIG_BYTES + "}")
    with pytest.raises(AdapterTooLarge, match="at most 1048576 bytes"):
        read_json(path)


def test_an_archive_that_inflates_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "MAX_ADAPTER_BYTES", 1_000_000)
    path = tmp_path / "bomb.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 2_000_000)
    assert path.stat().st_size < 10_000
    with pytest.raises(AdapterTooLarge, match=r"bomb\.bin: got '2000000 bytes'"):
        read_pickle(path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"weight": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    for at in range(0, len(data) - 22, 7):
        data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(AdapterFileInvalid, match=r"a\.bin: file: got .*expected"):
        read_pickle(path)


def test_a_folder_of_too_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_FILES", 1)
    for name in "ab":
        (tmp_path / name).touch()
    with pytest.raises(AdapterFileInvalid, match="files: got 2, expected at most 1"):
        list_folder(tmp_path)


def test_numbers_that_float32_cannot_hold_are_refused() -> None:
    tensors = TensorFile("f", {"w": torch.full((2,), 1e300, dtype=torch.float64)})
    with pytest.raises(AdapterFileInvalid, match="f: w: got 'NaN or infinity'"):
        tensors.take("w", (2,))


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


ODD_TENSORS = [
    pytest.param(lambda: torch.empty(4, 24, device="meta"), id="meta"),
    pytest.param(_nested, id="nested"),
    pytest.param(lambda: torch.eye(4, 24).to_sparse(), id="sparse"),
    pytest.param(lambda: torch.ones(4, 24, dtype=torch.complex64), id="complex"),
    pytest.param(lambda: torch.empty(4, 24, dtype=torch.float4_e2m1fn_x2), id="float4"),
    pytest.param(lambda: torch.tensor(1j), id="complex-scalar"),
    pytest.param(lambda: torch.empty((), dtype=torch.long, device="meta"), id="meta-scalar"),
]


@pytest.mark.parametrize("make", ODD_TENSORS)
@pytest.mark.parametrize("reader", ["take", "take_int"])
def test_tensors_without_plain_numbers_are_refused(
    make: Callable[[], torch.Tensor], reader: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    torch.save({"w": make()}, path)
    tensors = read_pickle(path)
    with pytest.raises(AdapterFileInvalid, match=r"^a\.bin: w: got .*, expected "):
        tensors.take("w", (4, 24)) if reader == "take" else tensors.take_int("w")


@pytest.mark.parametrize("make", ODD_TENSORS[:3])
def test_the_shape_of_a_tensor_without_plain_numbers_is_not_used(
    make: Callable[[], torch.Tensor],
) -> None:
    with pytest.raises(AdapterFileInvalid, match="f: w: got 'a tensor that holds no plain"):
        TensorFile("f", {"w": make()}).shape("w", 2, "a (4, 24) tensor")
