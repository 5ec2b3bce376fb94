"""A server of the S3 protocol in a process of its own: moto's, which keeps objects in memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import s3fs

from benchmarks.services.ports import free_port


class S3:
    """A running store. Each :meth:`new_bucket` is empty and nobody else's."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.options: dict[str, Any] = {
            "key": "test-key",
            "secret": "test-secret",
            "endpoint_url": url,
        }
        """What fsspec needs to be told to open a bucket."""
        self._count = itertools.count()

    def new_bucket(self) -> str:
        """URL of a folder in a new bucket."""
        bucket = f"adapters-{next(self._count)}"
        s3fs.S3FileSystem(**self.options, skip_instance_cache=True).mkdir(bucket)
        return f"s3://{bucket}/blobs"


@contextmanager
def run_s3() -> Iterator[S3]:
    """A server that lives as long as the context."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        give_up_at = time.monotonic() + 60
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError("moto's server did not start; is moto[server] installed?")
            time.sleep(0.1)
        yield S3(url)
    finally:
        process.terminate()
        process.wait(30)


def _is_up(url: str) -> bool:
    """Whether it answers yet."""
    try:
        return httpx.get(f"{url}/moto-api/", timeout=5).status_code < 500
    except httpx.TransportError:
        return False
