"""A PostgreSQL of our own: Debian's binaries, a temporary folder, a free port."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from benchmarks.services.ports import free_port


def find_binaries() -> Path | None:
    """The folder of the newest PostgreSQL installed, if there is one."""
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(folders, key=lambda folder: int(folder.parent.name), default=None)


class Postgres:
    """A running PostgreSQL. Each :meth:`new_database` is empty and nobody else's."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._count = itertools.count()

    def new_database(self) -> str:
        """URL of a new database."""
        name = f"test{next(self._count)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def is_up(self) -> bool:
        """Whether it takes connections yet."""
        try:
            psycopg.connect(self._url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self._port}/{database}"


@contextmanager
def run_postgres(binaries: Path) -> Iterator[Postgres]:
    """A server that lives as long as the context. It refuses root, so root becomes ``postgres``."""
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="reft-postgres-"))
    try:
        if user is not None:
            account = pwd.getpwnam(user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        initdb = [str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "postgres"]
        subprocess.run(
            [*initdb, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale", "C.UTF-8"],
            user=user,
            cwd=folder,
            check=True,
            capture_output=True,
        )
        port = free_port()
        settings = ["fsync=off", f"unix_socket_directories={folder}", "max_connections=200"]
        options = [part for setting in settings for part in ("-c", setting)]
        command = [str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(port)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *options],
                user=user,
                cwd=folder,
                stdout=log,
                stderr=log,
            )
        try:
            server = Postgres(port)
            give_up_at = time.monotonic() + 60
            while not server.is_up():
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < give_up_at, "PostgreSQL did not start"
                time.sleep(0.1)
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # ends sessions that are still open
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
