"""Runs an image as a strict orchestrator would: namespaces, a read-only root, no privileges."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from deploy.docker.stages import CHROOT, Image, mount_devices


class Container:
    """An image's root, read-only, with its volumes; commands run in it one by one."""

    def __init__(self, image: Image, folder: Path) -> None:
        self._image = image
        self._root = folder / "root"
        self._volumes = folder / "volumes"
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "log"

    def __enter__(self) -> Container:
        image, root = self._image, self._root
        image.mount(root, None)
        user, group = map(int, image.user.split(":"))
        for volume in image.volumes:
            held = self._volumes / volume.strip("/").replace("/", "-")
            held.mkdir(parents=True, mode=0o700)
            os.chown(held, user, group)
            _call(["mount", "--bind", str(held), str(root / volume.strip("/"))])
        # As `docker run --read-only --tmpfs /tmp` mounts it: nothing in it can be executed.
        options = "rw,noexec,nosuid,nodev,mode=1777"
        _call(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(root / "tmp")])
        mount_devices(root)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self._first_pid(), signal.SIGKILL)
            self._process.wait()
        if error is not None and self._log.is_file():
            print(self._log.read_text()[-4000:])

    def check(self, command: list[str], what: str) -> None:
        """Run ``command``, beside the server if it is up, and end the rehearsal if it fails."""
        done = self._run(command)
        if done.returncode != 0:
            output = (done.stdout + done.stderr)[-4000:]
            raise SystemExit(f"FAIL  {what}: status {done.returncode}\n{output}")
        print(f"ok    {what}", flush=True)

    def start(self, env: dict[str, str]) -> None:
        """Start the entry point as process 1 of a container with no network but loopback."""
        image = self._image
        self._image.env = image.env | env
        command = ["unshare", "--net", "--pid", "--fork", f"--mount-proc={self._root}/proc"]
        inner = 'ip link set lo up && exec "$@"'
        command += ["sh", "-c", inner, "sh", *self._entry([*image.entrypoint, *image.command])]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=image.env, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_healthy(self, timeout_s: float) -> None:
        """Wait until the image's own health check passes."""
        assert self._process is not None
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise SystemExit(f"FAIL  the server ended with {self._process.returncode}")
            if self._run(self._image.healthcheck).returncode == 0:
                return
            time.sleep(0.5)
        raise SystemExit(f"FAIL  not healthy after {timeout_s:.0f} s")

    def stop(self, timeout_s: float) -> tuple[int, float]:
        """Send the image's stop signal to process 1; its exit status and how long it took."""
        assert self._process is not None
        began = time.monotonic()
        os.kill(self._first_pid(), getattr(signal, self._image.stop_signal))
        return self._process.wait(timeout_s), time.monotonic() - began

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """``command`` in the container: in the server's namespaces once it is up."""
        outer = ["unshare", "--net", "--pid", "--fork", f"--mount-proc={self._root}/proc"]
        if self._process is not None:
            outer = ["nsenter", f"--target={self._first_pid()}", "--net", "--pid", "--mount"]
        return subprocess.run(
            [*outer, *self._entry(command)], env=self._image.env, capture_output=True, text=True
        )

    def _entry(self, command: list[str]) -> list[str]:
        """``command`` in the image's root, as its user, who can gain nothing."""
        image = self._image
        change = ["setpriv", "--no-new-privs", CHROOT, f"--userspec={image.user}", "--groups="]
        shell = ["/bin/sh", "-c", f'cd {image.workdir} && exec "$@"', "sh"]
        return [*change, str(self._root), *shell, *command]

    def _first_pid(self) -> int:
        """Process 1 of the container, by the number it has outside."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True)
