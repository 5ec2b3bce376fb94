"""The command's side of the protocol: starts a worker, asks it, notices when it is gone."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "runs" / "bench"
OWN_PYTHON = Path(sys.executable)
"""Of the environment that the command runs in."""

_QUIT_S = 20.0


class PeerMissing(Exception):
    """A peer cannot be measured; the message says why."""


class Worker:
    """A process that runs ``module`` and answers one request at a time.

    It lives until :meth:`close`, so that loading a model is done once, and has a process group
    of its own, so that whatever it started ends with it. What it prints goes to ``log``.
    """

    def __init__(self, python: Path, module: str, name: str, variables: dict[str, str]) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"bench-{name}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. Raises :class:`PeerMissing` on an error or none in time."""
        self.send(op, **arguments)
        return self.receive(timeout_s)

    def send(self, op: str, **arguments: Any) -> None:
        """Ask without waiting for the answer, which :meth:`receive` returns."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerMissing(f"the worker is gone: {self._end_of_log()}") from error

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer to the request sent before."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerMissing(f"no answer within {timeout_s:.0f} s") from None
        if not line:
            raise PeerMissing(f"the worker ended: {self._end_of_log()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise PeerMissing(answer["error"])
        return answer

    def close(self) -> None:
        """End the worker and everything it started; does nothing the second time."""
        if self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_QUIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        """Hand lines over; an empty one says that there are no more."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def _end_of_log(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (see {self.log.name} in runs/bench)"
