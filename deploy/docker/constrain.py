"""Prints deploy/docker/constraints.txt: what the image may install, in the versions tested here.

usage, in an environment that the tests pass in:
    python -m deploy.docker.constrain > deploy/docker/constraints.txt
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEFT_OUT = {"torch", "setuptools", "triton"}
"""The Dockerfile chooses PyTorch, and PyTorch the versions of what it alone needs."""

UNSHIPPED_EXTRAS = {"test", "demo"}


def main() -> None:
    """Print the closure of the project's requirements, one a line."""
    project = distribution("reft-serve")
    extras = set(project.metadata.get_all("Provides-Extra") or ()) - UNSHIPPED_EXTRAS
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [("reft-serve", extra) for extra in ("", *sorted(extras))]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if name != "reft-serve":
            found[name] = installed.version
        for text in installed.requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(need.name)
                if needed not in LEFT_OUT:
                    queue += [(needed, part) for part in ("", *need.extras)]
    print("# Written by deploy/docker/constrain.py; see there.")
    for name, version in sorted(found.items()):
        print(f"{name}=={version.partition('+')[0]}")


if __name__ == "__main__":
    main()
