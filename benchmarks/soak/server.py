"""The server as a process of its own, seen from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Footprint:
    """What a process holds of the system."""

    rss_mb: float
    num_threads: int
    num_files: int


class ServerProcess:
    """``reft serve``, with its data, temporary files and log in ``folder``."""

    def __init__(self, model: str, folder: Path, settings: Mapping[str, object]) -> None:
        self.data = folder / "data"
        self.temporary = folder / "tmp"
        self._log = folder / "server.log"
        self.temporary.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("REFT_")}
        environment |= {"TMPDIR": str(self.temporary)}
        given = {"data_dir": self.data, "log_format": "json", **settings}
        environment |= {f"REFT_{name.upper()}": str(value) for name, value in given.items()}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve", "--model", model, "--port", "0"],
                stdout=log,
                stderr=log,
                env=environment,
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def wait_ready(self, timeout_s: float = _START_TIMEOUT_S) -> str:
        """Its address, once it answers there."""
        give_up_at = time.monotonic() + timeout_s
        while time.monotonic() < give_up_at and self._process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", self._log.read_text()):
                return found[0]
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"the server did not start:\n{self.tail()}")

    def footprint(self) -> Footprint | None:
        """What it holds now; None where there is no /proc to ask."""
        proc = Path("/proc", str(self._process.pid))
        try:
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            num_files = len(list((proc / "fd").iterdir()))
        except FileNotFoundError:
            return None
        rss_kb, num_threads = (int(status[key].split()[0]) for key in ("VmRSS", "Threads"))
        return Footprint(rss_kb / 1024, num_threads, num_files)

    def errors(self) -> list[str]:
        """What it logged as an error, or wrote past its log."""
        found = []
        for line in self._log.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                if re.search(r"Traceback|Exception|Error", line):
                    found.append(line)
                continue
            if isinstance(record, dict) and record.get("level") in ("error", "critical"):
                found.append(f"{record.get('event')}: {record.get('exception', '')[-600:]}")
        return found

    def stop(self) -> int:
        """End it in order and return its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return -9

    def kill(self) -> None:
        """End it, however."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def tail(self, num_lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text().splitlines()[-num_lines:])


async def read_metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """Every metric by name, those with labels summed over them."""
    answer = await http.get("/metrics")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
