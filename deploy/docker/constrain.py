"""Prints deploy/docker/constraints.txt: what the image may install, in the versions tested here.

usage, in an environment that the tests pass in:
    python -m deploy.docker.constrain > deploy/docker/constraints.txt
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.docker.dockerfile import read

PROJECT = Path(__file__).parents[2]
STAGE = "dependencies-cpu"
"""The stage whose ``EXTRAS`` are installed; that of CUDA has the same."""

LEFT_OUT = {"torch", "setuptools", "triton"}
"""The Dockerfile chooses PyTorch, and PyTorch the versions of what it alone needs."""


def main() -> None:
    """Print what :func:`versions` finds, one a line."""
    print("# Written by deploy/docker/constrain.py; see there.")
    for name, version in sorted(versions().items()):
        print(f"{name}=={version}")


def shipped_extras() -> list[str]:
    """The extras that the image has, unless told otherwise."""
    arguments = read(PROJECT / "Dockerfile").stages[STAGE].instructions
    extras = next(i.pairs["EXTRAS"] for i in arguments if "EXTRAS" in i.pairs)
    return extras.split(",")


def versions() -> dict[str, str]:
    """The closure of what the image is given, without the project: versions here, by name."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in shipped_extras():
        wanted += project["optional-dependencies"][extra]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = _names(wanted, "")
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = installed.version.partition("+")[0]
        queue += _names(installed.requires or (), extra)
    found.pop(canonicalize_name(project["name"]), None)
    return found


def _names(needs: Iterable[str], extra: str) -> list[tuple[str, str]]:
    """The packages that these requirements name, each also with the extras that it is to have."""
    parsed = [Requirement(text) for text in needs]
    return [
        (canonicalize_name(need.name), part)
        for need in parsed
        if need.marker is None or need.marker.evaluate({"extra": extra})
        if canonicalize_name(need.name) not in LEFT_OUT
        for part in ("", *need.extras)
    ]


if __name__ == "__main__":
    main()
