"""What our adapters written as other libraries' folders have in common."""

from __future__ import annotations

from pathlib import Path

from reft_core.adapter import Adapter
from reft_core.errors import UnsupportedFeature
from reft_core.spec import AdapterSpec

SPEC_FILE = "reft_serve.json"
"""Written beside the library's own files: our spec, which its config cannot hold."""


def check_plain(adapter: Adapter, target: str) -> None:
    """Raise :class:`UnsupportedFeature` for what no ``target`` here has a form for.

    That is virtual tokens, a classification head, and an interchange, which takes states of
    another prompt: without them it is no smaller edit but another one.
    """
    spec = adapter.spec
    if spec.prefix is not None:
        raise UnsupportedFeature.because("prefix", spec.prefix.kind, f"none, to be {target}")
    if spec.task.kind != "generation":
        raise UnsupportedFeature.because("task", spec.task.kind, f"'generation', to be {target}")
    for name, site in spec.sites.items():
        if site.interchange:
            raise UnsupportedFeature.because(
                f"sites.{name}.interchange", True, f"false, to be {target}: a source would be lost"
            )


def write_spec(spec: AdapterSpec, folder: Path) -> None:
    """Put our spec into a folder as :data:`SPEC_FILE`."""
    (folder / SPEC_FILE).write_text(spec.to_json() + "\n")
