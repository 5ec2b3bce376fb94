"""A server inside this process, for as long as a command needs one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reft_core.errors import EngineUnavailable
from server.cli.serve import load_app

if TYPE_CHECKING:
    from server.settings import Settings


@contextmanager
def embedded_server(settings: Settings) -> Iterator[str]:
    """Serve in a thread, on the address in ``settings``, and give the server's URL.

    Raises what loading raises, and :class:`EngineUnavailable` if the server ends at once.
    """
    from server.http.run import DrainingServer
    from server.observability.logs import configure_logging

    configure_logging("error", settings.log_format)
    app, _, _ = load_app(settings)
    urls: list[str] = []
    is_ready = threading.Event()

    def on_ready(url: str) -> None:
        urls.append(url)
        is_ready.set()

    server = DrainingServer(app, settings, on_ready)

    def run() -> None:
        try:
            server.run()
        except SystemExit:
            pass  # uvicorn's way to say that it could not start, which it has logged
        finally:
            is_ready.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        is_ready.wait()
        if not urls:
            raise EngineUnavailable("the server in this process ended before it was ready")
        yield urls[0]
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join()
