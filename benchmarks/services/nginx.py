"""nginx in front of several servers, run in a temporary folder."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.services.ports import free_port

# What did not answer is asked of the next server, posts included: the same upload twice is one
# version, and a generation changes nothing.
_CONFIG = """
user {user};
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log warn;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 64m;
  upstream replicas {{
{servers}
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_next_upstream error timeout http_503 non_idempotent;
    }}
  }}
}}
"""


def find_nginx() -> str | None:
    """The program, if it is installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@contextmanager
def run_nginx(program: str, urls: Sequence[str]) -> Iterator[str]:
    """Its address, while it hands requests to ``urls`` in turn."""
    folder = Path(tempfile.mkdtemp(prefix="reft-nginx-"))
    port = free_port()
    servers = "\n".join(
        f"    server {url.removeprefix('http://')} max_fails=1 fail_timeout=2s;" for url in urls
    )
    config = folder / "nginx.conf"
    config.write_text(
        _CONFIG.format(folder=folder, port=port, servers=servers, user=getpass.getuser())
    )
    command = [program, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
    process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        give_up_at = time.monotonic() + 30
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"nginx did not start: {(folder / 'error.log').read_text()}")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _is_up(url: str) -> bool:
    """Whether it answers yet."""
    try:
        return httpx.get(f"{url}/healthz", timeout=10).is_success
    except httpx.TransportError:
        return False
