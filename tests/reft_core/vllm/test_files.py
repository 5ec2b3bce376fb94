"""Files by digest: found in the spool and in shared places, whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from reft_core.vllm.files import AdapterFiles


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_is_put_is_found_by_every_process(tmp_path: Path) -> None:
    digest = AdapterFiles(tmp_path / "spool", 1000).put(b"one")
    assert digest == digest_of(b"one")
    assert AdapterFiles(tmp_path / "spool", 1000).get(digest) == b"one"
    assert AdapterFiles(tmp_path / "spool", 1000).get(digest_of(b"two")) is None


def test_a_damaged_file_is_not_found_until_it_is_put_again(tmp_path: Path) -> None:
    files = AdapterFiles(tmp_path, 1000)
    digest = files.put(b"one")
    (tmp_path / f"{digest}.safetensors").write_bytes(b"onf")
    assert files.get(digest) is None
    assert files.put(b"one") == digest
    assert files.get(digest) == b"one"


def test_shared_places_are_followed_as_they_change(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "deep").mkdir(parents=True)
    files = AdapterFiles(tmp_path / "spool", 1000, [str(place)])
    (place / "deep" / "a.safetensors").write_bytes(b"one")
    (place / "readme.txt").write_bytes(b"no adapter")
    assert files.refresh() == {digest_of(b"one"): b"one"}
    assert files.refresh() == {}
    (place / "b.safetensors").write_bytes(b"two")
    (place / "deep" / "a.new").write_bytes(b"three")
    os.replace(place / "deep" / "a.new", place / "deep" / "a.safetensors")
    assert files.refresh().keys() == {digest_of(b"two"), digest_of(b"three")}
    assert files.listed() == {digest_of(b"two"), digest_of(b"three")}
    (place / "b.safetensors").unlink()
    files.refresh()
    assert files.listed() == {digest_of(b"three")}


def test_a_file_that_was_asked_for_outlives_its_owners(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "a.safetensors").write_bytes(b"one")
    files = AdapterFiles(tmp_path / "spool", 1000, [str(place)])
    assert files.get(digest_of(b"one")) == b"one"
    (place / "a.safetensors").unlink()
    assert files.get(digest_of(b"one")) == b"one"


def test_places_may_be_urls_and_may_be_away(tmp_path: Path) -> None:
    files = AdapterFiles(tmp_path, 1000, ["memory://nowhere", str(tmp_path / "absent")])
    assert files.get(digest_of(b"one")) is None
    assert files.refresh() == {}


def test_the_oldest_files_that_nobody_holds_make_room(tmp_path: Path) -> None:
    files = AdapterFiles(tmp_path, 8)
    held = files.put(b"held")
    for age, digest in enumerate([held, files.put(b"away")]):
        os.utime(tmp_path / f"{digest}.safetensors", (age, age))
    files.put(b"more", held={held})
    assert files.get(held) == b"held"
    assert files.get(digest_of(b"more")) == b"more"
    assert files.get(digest_of(b"away")) is None


def test_a_spool_is_for_its_owner_alone(tmp_path: Path) -> None:
    AdapterFiles(tmp_path / "spool", 1000)
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_no_path_is_made_of_what_is_no_digest(tmp_path: Path, name: str) -> None:
    assert AdapterFiles(tmp_path / "spool", 1000).get(name) is None
