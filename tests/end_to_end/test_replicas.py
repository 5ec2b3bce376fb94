"""Two real servers behind nginx, on one PostgreSQL and one S3 store; one of them is killed."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.chaos.process import KillableServer
from benchmarks.residency import adapter_files
from benchmarks.services.nginx import find_nginx, run_nginx
from benchmarks.soak.world import save_tiny_model
from reft_core.loading import load_model
from tests.server.services import postgres, s3  # noqa: F401  # fixtures

KEY = secrets.token_urlsafe(24)
ADMIN = {"Authorization": f"Bearer {KEY}"}


class Traffic(threading.Thread):
    """Uploads and asks through nginx until it is told to end, and remembers what was answered."""

    def __init__(self, url: str, name: str, files: Iterator[bytes]) -> None:
        super().__init__()
        self.uploaded: dict[str, str] = {}
        """Digest by name@version, as acknowledged."""
        self.problems: list[str] = []
        self.num_answers = 0
        self.ending = threading.Event()
        self._http = httpx.Client(base_url=url, headers=ADMIN, timeout=60)
        self._name = name
        self._files = files

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                self._turn()
        except Exception as error:
            self.problems.append(repr(error))
        finally:
            self._http.close()

    def _turn(self) -> None:
        data = next(self._files)
        answer = self._http.post(f"/admin/adapters/{self._name}", content=data)
        if answer.is_success:
            digest = hashlib.sha256(data).hexdigest()
            self.uploaded[f"{self._name}@{answer.json()['version']}"] = digest
        body = {"model": self._name, "prompt": "abc", "max_tokens": 4, "temperature": 0}
        for each in (
            answer,
            self._http.get("/v1/models"),
            self._http.post("/v1/completions", json=body),
        ):
            self.num_answers += 1
            if not each.is_success:
                self.problems.append(f"{each.request.url}: {each.status_code} {each.text[:200]}")


def test_a_replica_that_is_killed_takes_nothing_with_it(tmp_path, postgres, s3):  # noqa: F811
    nginx = find_nginx()
    if nginx is None:
        pytest.skip("nginx is not installed")
    model = tmp_path / "tiny-llama"
    save_tiny_model(model, seed=0)
    description = load_model(str(model)).description
    shared = {
        "database_url": postgres.new_database(),
        "blob_url": s3.new_bucket(),
        "blob_options": json.dumps(s3.options),
        "admin_key": KEY,
    }
    servers = [
        KillableServer(model, tmp_path / f"{i}.log", {**shared, "data_dir": tmp_path / f"data-{i}"})
        for i in range(2)
    ]
    try:
        urls = [server.start() for server in servers]
        one, other = (httpx.Client(base_url=url, headers=ADMIN, timeout=60) for url in urls)
        first = next(adapter_files(description, 2, [0], seed=99))
        assert one.post("/admin/adapters/first", content=first).status_code == 201
        assert other.get("/admin/adapters/first/file").content == first
        body = {"model": "first", "prompt": "abc", "max_tokens": 4, "temperature": 0}
        answers = [each.post("/v1/completions", json=body).json() for each in (one, other)]
        assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
        assert other.delete("/admin/adapters/first").is_success
        assert one.post("/v1/completions", json=body).status_code == 404
        one.close()
        with run_nginx(nginx, urls) as url:
            traffic = [
                Traffic(url, f"name-{i}", adapter_files(description, 2, [0], seed=i))
                for i in range(3)
            ]
            for each in traffic:
                each.start()
            time.sleep(1.5)
            before = sum(each.num_answers for each in traffic)
            servers[0].kill()
            time.sleep(1.5)
            for each in traffic:
                each.ending.set()
            for each in traffic:
                each.join(60)
        assert [problem for each in traffic for problem in each.problems] == []
        assert before > 0
        assert sum(each.num_answers for each in traffic) > before
        for each in traffic:
            for reference, digest in each.uploaded.items():
                file = other.get(f"/admin/adapters/{reference}/file")
                assert hashlib.sha256(file.content).hexdigest() == digest
        other.close()
        assert servers[1].stop() == 0
    finally:
        for server in servers:
            server.kill()
