"""A file is written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from reft_core.adapter import write_durably


def test_write_durably_replaces_whole_files(tmp_path: Path) -> None:
    """Makes folders that are missing, leaves mode 0644 and nothing else."""
    path = tmp_path / "a" / "b" / "file.safetensors"
    for data in (b"first", b"second, longer", b""):
        write_durably(path, data)
        assert path.read_bytes() == data
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file.safetensors"
    write_durably(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(error)):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_reach_the_disk_before_the_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the file, rename, fsync of the folder."""
    path = tmp_path / "file.safetensors"
    steps: list[str] = []
    fsync, rename = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        steps.append("fsync folder" if stat.S_ISDIR(mode) else "fsync file")
        fsync(descriptor)

    def spy_replace(source: str, target: Path) -> None:
        assert Path(source).read_bytes() == b"data", "all bytes are in the file"
        assert not path.exists()
        steps.append("replace")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_durably(path, b"data")
    assert steps == ["fsync file", "replace", "fsync folder"]
