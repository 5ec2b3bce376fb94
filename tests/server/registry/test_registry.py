from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event

from reft_core.errors import (
    AdapterConflict,
    AdapterFileInvalid,
    AdapterMismatch,
    AdapterNotFound,
    InvalidRequest,
    RequestFailed,
)
from server.registry import FolderBlobs, Registry
from server.registry.changes import NameChange
from tests.server.fakes import MODEL, make_adapter

MAX_BYTES = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def registry(folder: Path):
    opened = Registry.open(folder, MODEL, MAX_BYTES)
    yield opened
    opened.close()


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def num_blobs(folder: Path) -> int:
    return len(FolderBlobs(folder / "blobs"))


def test_versions_count_up_and_the_newest_is_current(registry):
    first, second = make_adapter(1), make_adapter(2)
    assert registry.upload("tone", first).version.number == 1
    uploaded = registry.upload("tone", second)
    assert (uploaded.version.number, uploaded.created) == (2, True)
    assert registry.current("tone").digest == digest_of(second)
    assert [v.digest for v in registry.versions("tone")] == [digest_of(first), digest_of(second)]
    assert registry.read(digest_of(first)) == first


def test_the_same_bytes_are_the_same_version_and_become_current_again(registry):
    first, second = make_adapter(1), make_adapter(2)
    registry.upload("tone", first)
    registry.upload("tone", second)
    again = registry.upload("tone", first)
    assert (again.version.number, again.created) == (1, False)
    assert registry.current("tone").number == 1
    assert len(registry.versions("tone")) == 2
    assert registry.upload("tone", make_adapter(3)).version.number == 3


def test_every_form_of_reference_resolves(registry):
    first, second = make_adapter(1), make_adapter(2)
    registry.upload("tone", first)
    registry.upload("tone", second)
    old, new = digest_of(first), digest_of(second)
    assert registry.resolve(MODEL.name) is None
    assert registry.resolve("tone").digest == new
    assert registry.resolve("tone@1").digest == old
    assert registry.resolve(f"tone@sha256:{old[:12]}").digest == old
    assert registry.resolve(f"tone@sha256:{old}").digest == old
    assert registry.resolve(registry.current("tone").reference).digest == new


@pytest.mark.parametrize(
    "model",
    [
        "other",
        "tone@3",
        "tone@0",
        "tone@",
        "tone@latest",
        "tone@sha256:abc",
        "tone@sha256:" + "0" * 12,
        "tone@sha256:%%%%%%%%%%%%",
        "@1",
        "",
        "../../etc/passwd",
        "tone@99999999999999999999",
    ],
)
def test_unknown_references_are_not_found(registry, model):
    registry.upload("tone", make_adapter(1))
    with pytest.raises(
        AdapterNotFound, match=r"tiny-base \(base\), tone|version of tone"
    ) as caught:
        registry.resolve(model)
    assert caught.value.field == "model"


def test_an_unknown_version_of_a_known_name_is_told_which_there_are(registry):
    for seed in (1, 2):
        registry.upload("tone", make_adapter(seed))
    with pytest.raises(AdapterNotFound, match=r"got 'tone@9', expected .*tone.*: @1, @2$"):
        registry.resolve("tone@9")


def test_what_is_current_already_is_not_written_again(registry):
    """A server that registers a folder of thousands at every start does not wait for the disk."""
    data, other = make_adapter(1), make_adapter(2)
    registry.upload("tone", data)
    statements: list[str] = []
    event.listen(
        registry.engine,
        "before_cursor_execute",
        lambda _connection, _cursor, statement, *_: statements.append(statement),
    )
    assert not registry.upload("tone", data).created
    assert {statement.partition(" ")[0] for statement in statements} == {"BEGIN", "SELECT"}
    assert "BEGIN IMMEDIATE" not in statements
    registry.upload("tone", other)
    assert registry.upload("tone", data).version.number == 1
    assert registry.current("tone").number == 1


def test_the_list_of_known_names_is_capped(registry):
    data = make_adapter(1)
    for index in range(25):
        registry.upload(f"a{index:02}", data)
    with pytest.raises(AdapterNotFound, match="a19 and others;"):
        registry.resolve("nope")


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "../x", "x" * 97, "ü", "a\n"])
def test_bad_names_are_refused(registry, folder, name):
    with pytest.raises(InvalidRequest, match="name"):
        registry.upload(name, make_adapter(1))
    assert num_blobs(folder) == 0


def test_the_base_models_name_is_taken(registry):
    with pytest.raises(AdapterConflict, match="base model"):
        registry.upload(MODEL.name, make_adapter(1))


def test_a_refused_file_leaves_nothing(registry, folder):
    other = replace(MODEL, hidden_size=16).to_base_spec()
    with pytest.raises(AdapterMismatch, match=r"base\.hidden_size: got 16, expected 8"):
        registry.upload("tone", make_adapter(1, base=other))
    with pytest.raises(AdapterFileInvalid):
        registry.upload("tone", b"garbage")
    assert num_blobs(folder) == 0
    assert registry.all_current() == []


def test_deleting_removes_versions_and_files_but_no_number_is_used_again(registry, folder):
    registry.upload("tone", make_adapter(1))
    registry.upload("tone", make_adapter(2))
    deleted = registry.delete("tone")
    assert [v.number for v in deleted.versions] == [1, 2]
    assert num_blobs(folder) == 2
    assert set(registry.collect()) == set(deleted.orphaned)
    assert num_blobs(folder) == 0
    with pytest.raises(AdapterNotFound):
        registry.resolve("tone")
    with pytest.raises(AdapterNotFound):
        registry.delete("tone")
    assert registry.upload("tone", make_adapter(1)).version.number == 3
    with pytest.raises(AdapterNotFound):
        registry.resolve("tone@1")


def test_a_file_that_another_name_uses_stays(registry, folder):
    data = make_adapter(1)
    registry.upload("tone", data)
    registry.upload("voice", data)
    assert registry.delete("tone").orphaned == []
    assert registry.read(digest_of(data)) == data
    assert registry.collect() == []
    assert registry.delete("voice").orphaned == [digest_of(data)]
    assert registry.collect() == [digest_of(data)]
    assert num_blobs(folder) == 0


def test_everything_survives_a_restart(folder):
    data = make_adapter(1, description="kept")
    registry = Registry.open(folder, MODEL, MAX_BYTES)
    before = registry.upload("tone", data).version
    registry.close()
    registry = Registry.open(folder, MODEL, MAX_BYTES)
    try:
        assert registry.current("tone") == before
        assert before.spec.description == "kept"
        assert registry.read(before.digest) == data
    finally:
        registry.close()


def test_the_file_is_stored_before_the_catalog_mentions_it(registry, folder, monkeypatch):
    def crash(*_args):
        assert num_blobs(folder) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(NameChange, "add", crash)
    with pytest.raises(KeyboardInterrupt):
        registry.upload("tone", make_adapter(1))
    monkeypatch.undo()
    assert registry.all_current() == []
    assert registry.upload("tone", make_adapter(1)).created


def test_the_catalog_forgets_before_the_file_goes(registry, monkeypatch):
    data = make_adapter(1)
    registry.upload("tone", data)

    def crash(_self, digest):
        assert digest == digest_of(data)
        assert registry.all_current() == []
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderBlobs, "remove", crash)
    registry.delete("tone")
    with pytest.raises(KeyboardInterrupt):
        registry.collect()
    monkeypatch.undo()
    assert registry.collect() == [digest_of(data)]
    with pytest.raises(AdapterNotFound):
        registry.resolve("tone")


def test_a_start_sweeps_up_what_died_uploads_left(folder):
    registry = Registry.open(folder, MODEL, MAX_BYTES)
    kept = registry.upload("tone", make_adapter(1)).version
    registry.upload("voice", make_adapter(2))
    (trashed,) = registry.delete("voice").orphaned
    blobs = FolderBlobs(folder / "blobs")
    with registry.incoming() as file:
        file.write(b"stored, but never recorded")
        blobs.put(file)
        stray = file.digest
    dead = blobs.temporary / ".tmp-dead"
    dead.write_bytes(b"half of an upload")
    with registry.incoming() as alive:
        alive.write(b"half of another")
        Registry.open(folder, MODEL, MAX_BYTES).close()
        assert not dead.exists()
        assert alive.path.exists()
    registry.close()
    assert set(blobs.digests()) == {kept.digest, trashed}
    assert stray not in blobs
    assert not alive.path.exists()


def test_a_damaged_file_is_noticed_and_healed_by_a_new_upload(registry, folder):
    data = make_adapter(1)
    digest = registry.upload("tone", data).version.digest
    path = folder / "blobs" / digest[:2] / f"{digest}.safetensors"
    path.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(RequestFailed, match="damaged"):
        registry.read(digest)
    registry.upload("tone", data)
    assert registry.read(digest) == data
    path.unlink()
    with pytest.raises(AdapterNotFound):
        registry.read(digest)


def test_a_blob_path_is_made_of_hex_digits_only(tmp_path):
    blobs = FolderBlobs(tmp_path / "blobs")
    for bad in ("../../etc/passwd", "", "AB" * 32, "ab" * 31 + "/.."):
        with pytest.raises(AssertionError):
            blobs.get(bad)


def test_uploads_and_deletes_of_the_same_bytes_at_once_never_lose_a_file(registry):
    files = [make_adapter(seed) for seed in range(2)]

    def churn(worker: int) -> None:
        for turn in range(8):
            name = f"n{(worker + turn) % 3}"
            registry.upload(name, files[turn % 2])
            if turn % 3 == worker % 3:
                try:
                    registry.delete(name)
                except AdapterNotFound:
                    continue
                finally:
                    registry.collect()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(churn, worker) for worker in range(4)]:
            done.result()
    for version in registry.all_current():
        assert digest_of(registry.read(version.digest)) == version.digest
