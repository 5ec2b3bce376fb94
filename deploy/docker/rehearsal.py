"""What deploy/docker/rehearse does, inside its mount namespace."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path

from deploy.docker.container import Container
from deploy.docker.context import Context
from deploy.docker.dockerfile import Dockerfile, read
from deploy.docker.stages import Builder, Image

PROJECT = Path(__file__).parents[2]


def main() -> None:
    """Build, run, report."""
    options = _options()
    _rehearse(options, Path(options.scratch))


def _rehearse(options: argparse.Namespace, scratch: Path) -> None:
    """Every step in order; raises on the first that fails."""
    file = read(PROJECT / "Dockerfile")
    given = dict(part.partition("=")[::2] for part in options.build_arg)
    env = {name: value or os.environ[name] for name, _, value in map(_split, options.env)}
    base = Path(options.base) if options.base else _make_base(file, options.target, scratch)
    builder = Builder(file, Context(PROJECT), base, scratch, given, env, options.bind)
    image = builder.build(options.target)
    for title, num_bytes in image.sizes():
        print(f"size  {title:<28} {num_bytes / 1e6:8.1f} MB")
    _serve(image, scratch)


def _serve(image: Image, scratch: Path) -> None:
    """Start the image as an orchestrator would, ask it something, and end it."""
    folder = "/var/cache/reft-serve/tiny"
    key = "rehearsal-key"
    with Container(image, scratch / "run") as box:
        box.check(["python3", "-c", _IS_CONFINED], "the process is confined")
        script = (PROJECT / "deploy/docker/tiny_model.py").read_text()
        box.check(["python3", "-c", script, folder], "a tiny model is written to the cache volume")
        box.check(["reft", "version"], "the command answers")
        began = time.monotonic()
        box.start({"REFT_MODEL": folder, "REFT_API_KEY": key, "REFT_ADMIN_KEY": f"{key}-of-admin"})
        box.wait_healthy(timeout_s=300)
        print(f"ok    healthy after {time.monotonic() - began:.1f} s")
        box.check(["python3", "-c", _REQUEST, key], "a request is answered, one without a key not")
        box.check(["python3", "-c", _NATIVE], "the CPU's kernels were compiled in the cache volume")
        status, seconds = box.stop(timeout_s=60)
        if status != 0:
            raise SystemExit(f"FAIL  {image.stop_signal}: exit status {status}, expected 0")
        print(f"ok    {image.stop_signal}: exit status 0 after {seconds:.1f} s")


_IS_CONFINED = """
import os
assert os.getuid() == os.getgid() == 10001 and not os.getgroups(), os.getresuid()
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status"))
assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, status["CapEff"]
assert status["NoNewPrivs"].strip() == "1"
for folder in ("/", "/opt", "/opt/app", "/usr/bin", "/etc"):
    try:
        open(folder + "/probe", "w")
    except OSError:
        continue
    raise AssertionError(folder + " can be written")
for folder in ("/tmp", "/var/lib/reft-serve", "/var/cache/reft-serve"):
    open(folder + "/probe", "w").close()
"""

_REQUEST = """
import json, sys, urllib.error, urllib.request
def ask(path, body=None, key=None):
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = "Bearer " + key
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request("http://127.0.0.1:8000" + path, data, headers)
    try:
        return 200, json.load(urllib.request.urlopen(request, timeout=60))
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
body = {"model": "tiny", "prompt": "Hello", "max_tokens": 5, "temperature": 0}
status, answer = ask("/v1/completions", body, sys.argv[1])
assert status == 200 and answer["usage"]["completion_tokens"] >= 1, answer
status, answer = ask("/v1/completions", body)
assert status == 401 and "message" in answer["error"], answer
status, answer = ask("/readyz")
assert (status, answer) == (200, {"status": "ready"}), answer
"""

_NATIVE = """
import pathlib, shutil
found = list(pathlib.Path.home().glob(".cache/reft-serve/native/*.so"))
assert found or not any(map(shutil.which, ("c++", "g++", "clang++"))), "none found"
"""


def _split(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _make_base(file: Dockerfile, target: str, scratch: Path) -> Path:
    """Debian's smallest system of the release that the Dockerfile names."""
    image = file.lineage(target)[0].base
    distribution, _, tag = image.partition(":")
    if distribution != "debian" or shutil.which("mmdebstrap") is None:
        raise SystemExit(
            f"base: got {image!r}; without --base this needs mmdebstrap and an image of Debian's"
        )
    folder = scratch / "base"
    sources = sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))
    command = ["mmdebstrap", "--quiet", "--variant=minbase", tag.removesuffix("-slim"), folder]
    subprocess.run([*map(str, command), *map(str, sources)], check=True)
    return folder


def _options() -> argparse.Namespace:
    """The command line, which deploy/docker/rehearse explains."""
    parser = argparse.ArgumentParser(prog="deploy/docker/rehearse")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--build-arg", action="append", default=[])
    parser.add_argument("--base")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--bind", action="append", default=[])
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
