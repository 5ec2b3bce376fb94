"""Shows the project's vLLM plugin to an interpreter that the project is not installed in."""

from __future__ import annotations

import tomllib
from pathlib import Path

from benchmarks.peers.protocol import ROOT

_GROUP = "vllm.general_plugins"


def plugin_names() -> tuple[str, ...]:
    """What the project calls its plugins, as ``VLLM_PLUGINS`` does."""
    return tuple(_entry_points())


def expose_plugin(folder: Path) -> None:
    """Make ``folder`` one that, on ``PYTHONPATH``, lets vLLM find the plugin.

    It gets the metadata that an installation would leave. The code itself is imported from
    where a worker runs, which is the project.
    """
    metadata = folder / "reft_serve_plugin-0.dist-info"  # an installed reft-serve is another one
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: reft-serve-plugin\nVersion: 0\n"
    )
    lines = [f"[{_GROUP}]", *(f"{name} = {place}" for name, place in _entry_points().items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _entry_points() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = project.get("entry-points", {}).get(_GROUP, {})
    return found
