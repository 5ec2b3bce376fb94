"""The server as a process that can be killed and is back in a second.

It is forked from a process that has imported everything already and has no threads; from there it
is the whole server: model, engine, registry, HTTP.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 60

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["benchmarks.chaos.preload"])


class KillableServer:
    """One server process at a time."""

    def __init__(self, model: Path, log: Path, settings: dict[str, Any]) -> None:
        self._model = model
        self._log = log
        self._settings = settings
        self._process: Any = None

    def start(self) -> str:
        """Start, and return its address once it is ready."""
        receive, send = _forks.Pipe(duplex=False)
        arguments = (self._model, self._log, self._settings, send)
        self._process = _forks.Process(target=serve, args=arguments)
        self._process.start()
        send.close()
        try:
            if receive.poll(_START_TIMEOUT_S):
                return str(receive.recv())
        except EOFError:
            pass
        finally:
            receive.close()
        self.kill()
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """``kill -9``."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def stop(self) -> int | None:
        """End it in order; its exit status."""
        self._process.terminate()
        self._process.join(_STOP_TIMEOUT_S)
        status: int | None = self._process.exitcode
        return status


def serve(model: Path, log: Path, settings: dict[str, Any], ready: Connection) -> None:
    """The life of a server process."""
    from server.app import create_app
    from server.http.run import DrainingServer
    from server.observability.logs import configure_logging
    from server.settings import Settings

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    configure_logging("warning", "json")
    chosen = Settings(model=str(model), port=0, device="cpu", dtype="float32", **settings)
    DrainingServer(create_app(chosen), chosen, ready.send).run()
