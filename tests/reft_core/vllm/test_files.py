"""Files by digest: found in the spool and in shared places, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

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


class NetworkFault(Exception):
    """Of a place's own library: no ``OSError``."""


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    """A place that is no folder."""
    system = MemoryFileSystem()
    system.mkdir("/bucket")
    yield system
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("method", ["find", "cat_file"])
def test_a_place_that_fails_in_its_own_way_keeps_what_was_known_of_it(
    tmp_path: Path, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NetworkFault("the server has hung up")

    files = AdapterFiles(tmp_path, 1000, ["memory://bucket"])
    bucket.pipe("/bucket/a.safetensors", b"one")
    files.refresh()
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, method, fail)
        bucket.pipe("/bucket/a.safetensors", b"two")
        bucket.pipe("/bucket/b.safetensors", b"new")
        assert files.refresh() == {}
        assert files.get(digest_of(b"one")) is None
        assert files.listed() == {digest_of(b"one")}
    assert files.refresh().keys() == {digest_of(b"two"), digest_of(b"new")}


@pytest.mark.parametrize("says_when", [True, False])
def test_a_file_replaced_by_one_of_its_size_is_noticed(
    tmp_path: Path, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, says_when: bool
) -> None:
    find, reads = MemoryFileSystem.find, []

    def bare(*args: Any, **options: Any) -> dict[str, Any]:
        """Like a list over HTTP: names and sizes."""
        return {
            path: {key: facts[key] for key in ("name", "size", "type")}
            for path, facts in find(*args, **options).items()
        }

    if not says_when:
        monkeypatch.setattr(MemoryFileSystem, "find", bare)
    read = MemoryFileSystem.cat_file
    monkeypatch.setattr(
        MemoryFileSystem, "cat_file", lambda *args: (reads.append(1), read(*args))[1]
    )
    files = AdapterFiles(tmp_path, 1000, ["memory://bucket"])
    bucket.pipe("/bucket/a.safetensors", b"one")
    files.refresh()
    assert files.refresh() == {}
    assert len(reads) == (1 if says_when else 2)
    bucket.pipe("/bucket/a.safetensors", b"two")
    assert files.refresh() == {digest_of(b"two"): b"two"}
    assert files.listed() == {digest_of(b"two")}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_a_folder_over_http_is_a_place(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")  # fsspec's
    folder = tmp_path / "shared"
    folder.mkdir()
    file = folder / "a.safetensors"
    file.write_bytes(b"one")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        files = AdapterFiles(tmp_path / "spool", 1000, [f"http://127.0.0.1:{server.server_port}/"])
        assert files.refresh() == {digest_of(b"one"): b"one"}
        file.write_bytes(b"two")
        assert files.refresh() == {digest_of(b"two"): b"two"}
        assert files.get(digest_of(b"two")) == b"two"
        server.shutdown()


def test_what_is_used_stays_and_what_is_held(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "a.safetensors").write_bytes(b"more")
    files = AdapterFiles(tmp_path / "spool", 12, [str(place)])
    held: set[str] = set()
    names = [files.put(data, held) for data in (b"held", b"used", b"away")]
    held.add(names[0])
    for age, name in enumerate(names):
        os.utime(tmp_path / "spool" / f"{name}.safetensors", (age, age))
    assert files.get(names[1]) == b"used"
    assert files.get(digest_of(b"more")) == b"more"
    assert [files.get(name) for name in names] == [b"held", b"used", None]


def test_files_that_another_process_removes_meanwhile_are_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, files = Path.stat, AdapterFiles(tmp_path, 8)
    gone = tmp_path / f"{files.put(b'gone')}.safetensors"

    def too_late(path: Path, **options: Any) -> os.stat_result:
        if path == gone:
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", too_late)
    assert files.get(files.put(b"more")) == b"more"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    files = AdapterFiles(tmp_path, 1000)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        files.put(b"one")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_spool_is_read_once_and_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = AdapterFiles(tmp_path, 1000)
    digest, reads, read = files.put(b"one"), [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), read(path))[1])
    assert files.get(digest) == b"one"
    assert len(reads) == 1


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
