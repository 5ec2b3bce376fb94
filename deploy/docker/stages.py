"""Builds stages of a Dockerfile, each as an overlay on the one below."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from deploy.docker.context import Context
from deploy.docker.dockerfile import Dockerfile, Instruction, Stage, substitute

CHROOT = "/usr/sbin/chroot"
"""By its whole path, as it is looked for on the path of the image."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Image:
    """A stage as it stands: its layers, the lowest first, and what it says of itself."""

    name: str
    layers: list[tuple[str, Path]]
    env: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    workdir: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"

    def sizes(self) -> list[tuple[str, int]]:
        """Bytes that each layer adds."""
        return [(title, _bytes_below(folder)) for title, folder in self.layers]

    def mount(self, target: Path, upper: Path | None, work: Path | None = None) -> None:
        """Mount all layers at ``target``; what is written goes to ``upper``, or is refused."""
        target.mkdir(parents=True, exist_ok=True)
        lower = ":".join(str(folder) for _, folder in reversed(self.layers))
        options = f"lowerdir={lower}"
        if upper is not None:
            options += f",upperdir={upper},workdir={work}"
        elif len(self.layers) == 1:
            options += f":{target}"  # an overlay that is only read needs two layers
        _call(["mount", "-t", "overlay", "overlay", "-o", options, str(target)])


class Builder:
    """Builds the stages that a target needs, once each."""

    def __init__(
        self,
        file: Dockerfile,
        context: Context,
        base: Path,
        scratch: Path,
        build_args: dict[str, str],
        host_env: dict[str, str],
        host_paths: list[str],
    ) -> None:
        self._file = file
        self._context = context
        self._base = base
        self._scratch = scratch
        self._build_args = build_args
        self._host_env = host_env
        self._host_paths = [path.partition(":") for path in host_paths]
        self._images: dict[str, Image] = {}

    def build(self, target: str) -> Image:
        """The image of ``target``."""
        for stage in self._file.needed(target):
            below = self._images.get(stage.base) or Image(stage.base, [("base image", self._base)])
            self._images[stage.name] = self._build_stage(stage, below)
        return self._images[target]

    def _build_stage(self, stage: Stage, below: Image) -> Image:
        """One stage on the image below; its steps write into one layer."""
        folder = self._scratch / stage.name
        root, upper, work = folder / "root", folder / "layer", folder / "work"
        for path in (root, upper, work):
            path.mkdir(parents=True)
        image = Image(
            stage.name,
            [*below.layers],
            dict(below.env),
            below.workdir,
            below.user,
            list(below.volumes),
            below.entrypoint,
            below.command,
            below.healthcheck,
            below.stop_signal,
        )
        image.mount(root, upper, work)
        self._show_host(root)
        args: dict[str, str] = {}
        for step in stage.instructions:
            began = time.monotonic()
            self._perform(step, image, args, root)
            if step.name in ("RUN", "COPY"):
                shown = f"{stage.name}: {step.name} {' '.join(step.value.split())}"
                print(f"step  {shown[:84]:<84} {time.monotonic() - began:6.1f} s", flush=True)
        _call(["umount", "--recursive", str(root)])
        image.layers.append((stage.name, upper))
        return image

    def _perform(self, step: Instruction, image: Image, args: dict[str, str], root: Path) -> None:
        """One instruction."""
        known = args | image.env
        match step.name:
            case "ARG":
                for name, default in step.pairs.items():
                    value = self._build_args.get(name, substitute(default, known))
                    if name in self._build_args or "=" in step.value:
                        args[name] = value
            case "ENV":
                image.env |= {n: substitute(v, known) for n, v in step.pairs.items()}
            case "WORKDIR":
                image.workdir = substitute(step.value, known)
                _inside(root, image.workdir).mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = step.value
            case "VOLUME":
                image.volumes += step.words
            case "ENTRYPOINT":
                image.entrypoint = step.words
            case "CMD":
                image.command = step.words
            case "HEALTHCHECK":
                image.healthcheck = Instruction("CMD", {}, step.value.removeprefix("CMD "), 0).words
            case "STOPSIGNAL":
                image.stop_signal = step.value
            case "COPY":
                self._copy(step, image, root)
            case "RUN":
                self._run(step, image, args, root)
            case "EXPOSE" | "LABEL":
                pass
            case _:
                raise ValueError(f"line {step.line}: {step.name} is not performed here")

    def _copy(self, step: Instruction, image: Image, root: Path) -> None:
        """COPY, from the context or from another stage."""
        *sources, target = step.words
        place = _inside(root, os.path.join(image.workdir, target))
        into = target.endswith("/") or len(sources) > 1
        origin = step.flags.get("from")
        for source in sources:
            if origin is None:
                self._context.copy(source, place, into=into)
            else:
                view = self._scratch / f"{image.name}-from-{origin}"
                self._images[origin].mount(view, None)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(_inside(view, source), place, symlinks=True, dirs_exist_ok=True)
                _call(["umount", str(view)])
        if "chmod" in step.flags:
            place.chmod(int(step.flags["chmod"], 8))

    def _run(self, step: Instruction, image: Image, args: dict[str, str], root: Path) -> None:
        """RUN, by the shell, in the stage's root."""
        env = {**self._host_env, **args, **image.env}
        command = [CHROOT, f"--userspec={image.user}", str(root)]
        command += ["/bin/sh", "-c", f"cd {image.workdir} && {step.value}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            output = (done.stdout + done.stderr)[-4000:]
            raise SystemExit(f"FAIL  line {step.line}: status {done.returncode}\n{output}")

    def _show_host(self, root: Path) -> None:
        """Devices, processes, name resolution, and what the caller names, for the steps of RUN."""
        mount_devices(root)
        _call(["mount", "-t", "proc", "proc", str(root / "proc")])
        shown = [("/etc/resolv.conf", "", ""), ("/etc/hosts", "", ""), *self._host_paths]
        for source, _, target in shown:
            place = _inside(root, target or source)
            if Path(source).is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            _call(["mount", "--bind", "-o", "ro", source, str(place)])


def mount_devices(root: Path) -> None:
    """A ``/dev`` of the few devices that a container has; never the machine's own."""
    devices = root / "dev"
    _call(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(devices)])
    for name in ("null", "zero", "full", "random", "urandom"):
        (devices / name).touch()
        _call(["mount", "--bind", f"/dev/{name}", str(devices / name)])
    (devices / "fd").symlink_to("/proc/self/fd")
    (devices / "shm").mkdir()
    _call(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(devices / "shm")])


def _inside(root: Path, path: str) -> Path:
    """``path``, which is absolute, below ``root``."""
    return root / path.lstrip("/")


def _bytes_below(folder: Path) -> int:
    """Disk space of a folder's files."""
    out = subprocess.run(["du", "-s", "-B1", str(folder)], check=True, capture_output=True).stdout
    return int(out.split()[0])


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True)
