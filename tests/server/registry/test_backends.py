"""What the registry promises on every database and store, and between servers that share them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reft_core.errors import (
    AdapterConflict,
    AdapterNotFound,
    InvalidRequest,
    RequestFailed,
    StorageUnavailable,
)
from server.database import sqlite_url, writing
from server.registry import BlobStore, Catalog, Filter, FolderBlobs, Registry
from server.registry.check import RegistryCheck
from server.registry.remote import RemoteBlobs
from server.registry.tables import names
from tests.server.fakes import MODEL, make_adapter

Open = Callable[[], Registry]


@pytest.fixture(params=["sqlite", "postgresql", "postgresql-s3"])
def open_one(request, tmp_path: Path) -> Iterator[Open]:
    """Opens servers' registries that share a database and a store, and closes them."""
    opened: list[Registry] = []
    url = sqlite_url(tmp_path / "catalog.sqlite")
    if request.param != "sqlite":
        url = request.getfixturevalue("postgres").new_database()
    s3 = request.getfixturevalue("s3") if request.param.endswith("s3") else None
    bucket = s3.new_bucket() if s3 is not None else None

    def make_store() -> BlobStore:
        if s3 is None:
            return FolderBlobs(tmp_path / "blobs")
        return RemoteBlobs(bucket, s3.options, tmp_path / f"replica-{len(opened)}", 10_000_000)

    def open_() -> Registry:
        store = make_store()
        opened.append(Registry.open(tmp_path, MODEL, 1 << 20, database=url, blobs=store))
        return opened[-1]

    yield open_
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_one: Open) -> Registry:
    return open_one()


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(registry: Registry) -> set[str]:
    return set(registry._blobs.digests())


def check(registry: Registry, *, repair: bool = False) -> list[str]:
    checking = RegistryCheck(registry._catalog, registry._blobs)
    return [finding.kind for finding in checking.run(repair=repair)]


def test_a_tenants_name_is_its_own_and_hides_the_shared_one(registry):
    shared, own = make_adapter(1), make_adapter(2)
    registry.upload("tone", shared)
    registry.upload("tone", make_adapter(3))
    registry.upload("tone", own, tenant="acme", actor="key-1")
    registry.upload("secret", own, tenant="acme")
    assert registry.resolve("tone", tenant="acme").digest == digest_of(own)
    assert registry.resolve("tone", tenant="other").digest == digest_of(make_adapter(3))
    assert [v.name for v in registry.all_current(tenant="acme")] == ["secret", "tone"]
    assert [v.tenant for v in registry.all_current(tenant="acme")] == ["acme", "acme"]
    assert [v.name for v in registry.all_current(tenant="other")] == ["tone"]
    with pytest.raises(AdapterNotFound) as caught:
        registry.resolve("secret", tenant="other")
    assert "secret" not in str(caught.value).replace("got 'secret'", "")
    with pytest.raises(AdapterNotFound):
        registry.resolve("tone@2", tenant="acme")  # not the shared version 2
    assert registry.resolve(f"tone@sha256:{digest_of(shared)}", tenant="acme").tenant == ""
    registry.delete("tone", tenant="acme")
    assert registry.resolve("tone", tenant="acme").number == 2
    with pytest.raises(AdapterNotFound):
        registry.resolve("tone@1", tenant="acme")
    with pytest.raises(AdapterNotFound):
        registry.delete("tone", tenant="other")


def test_promoting_and_rolling_back(registry):
    for seed in (1, 2, 3):
        registry.upload("tone", make_adapter(seed))
    assert registry.promote("tone", 1).number == 1
    assert registry.roll_back("tone").number == 3
    assert registry.roll_back("tone").number == 1
    assert registry.promote("tone", 1).number == 1
    assert registry.roll_back("tone").number == 3  # promoting what is current changed nothing
    with pytest.raises(AdapterNotFound, match="tone@9"):
        registry.promote("tone", 9)
    registry.upload("voice", make_adapter(1))
    with pytest.raises(AdapterConflict, match="another current version before"):
        registry.roll_back("voice")


def test_deleting_one_version(registry):
    for seed in (1, 2, 3):
        registry.upload("tone", make_adapter(seed))
    with pytest.raises(AdapterConflict, match="promote another first"):
        registry.delete_version("tone", 3)
    assert registry.delete_version("tone", 2).orphaned == [digest_of(make_adapter(2))]
    with pytest.raises(AdapterConflict):
        registry.roll_back("tone")
    with pytest.raises(AdapterNotFound):
        registry.delete_version("tone", 2)
    registry.delete_version("tone", 1)
    registry.delete_version("tone", 3)
    with pytest.raises(AdapterNotFound):
        registry.current("tone")
    assert registry.upload("tone", make_adapter(1)).version.number == 4


def test_lists_have_pages_and_filters(registry):
    for name in ("a_b", "aXb", "B", "a-c"):
        registry.upload(name, make_adapter(1))
    registry.upload("aXb", make_adapter(1), tenant="acme")
    registry.upload("zed", make_adapter(2, method="red"), tenant="acme")

    def ids(*arguments, **options):
        return [f"{v.tenant}/{v.name}" for v in registry.page(*arguments, **options)]

    everything = ["/B", "/a-c", "/a_b", "/aXb", "acme/aXb", "acme/zed"]
    assert sorted(ids(Filter())) == sorted(everything)
    pages: list[str] = []
    after, after_tenant = "", None
    while page := registry.page(Filter(), after, after_tenant, limit=2):
        pages += [f"{v.tenant}/{v.name}" for v in page]
        after, after_tenant = page[-1].name, page[-1].tenant
    assert pages == ids(Filter())
    assert pages == ["/B", "/a-c", "/aXb", "acme/aXb", "/a_b", "acme/zed"]  # by bytes
    assert ids(Filter(prefix="a_")) == ["/a_b"]
    assert ids(Filter(tenant="acme", prefix="a")) == ["acme/aXb"]
    assert ids(Filter(method="red")) == ["acme/zed"]
    assert ids(Filter(base="nothing")) == []


def test_the_log_says_who_did_what_newest_first(registry):
    registry.upload("tone", make_adapter(1), actor="alice")
    registry.upload("tone", make_adapter(1), actor="alice")  # nothing changed
    registry.upload("tone", make_adapter(2), actor="bob", tenant="acme")
    registry.pin("tone", True, actor="carol")
    registry.pin("tone", True, actor="carol")
    registry.delete("tone", actor="dave")
    entries = registry.audit(limit=10)
    assert [(e.actor, e.action, e.tenant, e.number) for e in entries] == [
        ("dave", "delete", "", 1),
        ("carol", "pin", "", 1),
        ("bob", "upload", "acme", 1),
        ("alice", "upload", "", 1),
    ]
    assert registry.audit(limit=1, before=entries[1].id) == [entries[2]]
    assert registry.audit(limit=10, tenant="acme") == [entries[2]]
    assert registry.audit(limit=10, name="voice") == []


def test_servers_see_each_others_changes_at_once(open_one):
    one, other = open_one(), open_one()
    data = make_adapter(1)
    version = one.upload("tone", data).version
    assert other.resolve("tone") == version
    assert other.read(version.digest) == data
    other.delete("tone")
    with pytest.raises(AdapterNotFound):
        one.resolve("tone")
    assert one.collect(older_than_s=3600) == []
    assert one.collect(keep=[version.digest]) == []
    assert one.collect() == [version.digest]
    assert stored(other) == set()


def test_a_file_uploaded_again_before_it_was_removed_stays(open_one):
    one, other = open_one(), open_one()
    data = make_adapter(1)
    one.upload("tone", data)
    one.delete("tone")
    other.upload("voice", data)
    assert one.collect() == []
    assert one.trash() == []
    assert one.read(digest_of(data)) == data


def test_servers_that_change_the_same_names_and_files_never_lose_one(open_one):
    files = [make_adapter(seed) for seed in range(2)]
    registries = [open_one(), open_one()]

    def churn(worker: int) -> None:
        registry = registries[worker % 2]
        for turn in range(8):
            name = f"n{(worker + turn) % 3}"
            registry.upload(name, files[turn % 2])
            try:
                if turn % 3 == worker % 3:
                    registry.delete(name)
                else:
                    registry.roll_back(name)
            except (AdapterNotFound, AdapterConflict):
                pass
            registry.collect()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(churn, worker) for worker in range(4)]:
            done.result()
    for version in registries[0].all_current():
        assert digest_of(registries[1].read(version.digest)) == version.digest
    assert check(registries[0]) == []


def test_a_check_finds_and_repairs_everything(registry):
    for seed in (1, 2, 3):
        registry.upload("tone", make_adapter(seed))
    registry.upload("voice", make_adapter(4))
    registry.upload("trashed", make_adapter(5))
    registry.delete("trashed")
    assert check(registry) == []
    registry._blobs.remove(digest_of(make_adapter(3)))  # the current one's
    registry._blobs.remove(digest_of(make_adapter(4)))
    with registry.incoming() as file:
        file.write(b"stray")
        registry._blobs.put(file)
    (registry._blobs.temporary / ".tmp-dead").write_bytes(b"x")
    with writing(registry.engine) as connection:
        connection.execute(
            names.insert().values(
                tenant="", name="odd", current=7, previous=None, last_number=7, pinned=False
            )
        )
    with registry.incoming() as alive:
        alive.write(b"still arriving")
        found = ["missing file", "missing file", "bad current", "stray file", "temporary file"]
        assert check(registry) == found
        assert check(registry, repair=True) == found
        assert alive.path.exists()
    assert check(registry) == []
    assert registry.current("tone").number == 2  # what was current before
    with pytest.raises(AdapterNotFound):
        registry.current("voice")
    assert digest_of(make_adapter(5)) in stored(registry)  # its time has not come


def test_a_digest_that_was_promised_is_checked(registry):
    data = make_adapter(1)
    with pytest.raises(InvalidRequest, match="x-expected-sha256"):
        registry.upload("tone", data, expected_digest="0" * 64)
    assert stored(registry) == set()
    assert registry.upload("tone", data, expected_digest=digest_of(data)).created


@pytest.mark.parametrize("tenant", ["a/b", "-x", "x" * 97, "a\0", "a\n"])
def test_bad_tenants_are_refused(tmp_path, tenant):
    registry = Registry.open(tmp_path, MODEL, 1 << 20)
    with pytest.raises(InvalidRequest, match="tenant"):
        registry.upload("tone", make_adapter(1), tenant=tenant)
    registry.close()


def test_a_remote_file_is_read_once_and_a_damaged_copy_is_not_used(s3, tmp_path):
    blobs = RemoteBlobs(s3.new_bucket(), s3.options, tmp_path / "local", 1000)
    registry = Registry.open(tmp_path, MODEL, 1 << 20, blobs=blobs)
    data = make_adapter(1)
    assert len(data) > 1000  # too large for this cache
    registry.upload("tone", data)
    assert registry.read(digest_of(data)) == data
    assert blobs._cache.num_bytes == 0
    blobs._cache._max_bytes = 10 * len(data)
    registry.read(digest_of(data))
    assert blobs._cache.num_bytes == len(data)
    (copy,) = (tmp_path / "local" / "cache").glob("??/*")
    blobs._fs.pipe_file(blobs._path(digest_of(data)), b"damaged in the store")
    assert registry.read(digest_of(data)) == data
    assert check(registry) == ["damaged file"]  # which looks past the cache
    copy.write_bytes(b"damaged here")
    with pytest.raises(RequestFailed, match="damaged"):
        registry.read(digest_of(data))
    registry.upload("tone", data)
    assert registry.read(digest_of(data)) == data
    registry.close()


def test_a_store_that_does_not_answer_refuses_the_upload(s3, tmp_path):
    options = {
        **s3.options,
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1},
    }
    blobs = RemoteBlobs("s3://bucket/x", options, tmp_path / "local", 1000)
    registry = Registry.open(tmp_path, MODEL, 1 << 20, blobs=blobs)
    with pytest.raises(StorageUnavailable):
        registry.upload("tone", make_adapter(1))
    assert registry.all_current() == []
    registry.close()


def test_a_url_that_no_store_has_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="blob_url"):
        RemoteBlobs("nonsense://x", {}, tmp_path, 0)


def test_a_catalog_is_opened_by_url(tmp_path):
    Catalog.at(sqlite_url(tmp_path / "x.sqlite")).close()
    assert (tmp_path / "x.sqlite").exists()
