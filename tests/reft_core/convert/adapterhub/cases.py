"""Adapters saved by AdapterHub's `adapters`, read, and ways to damage them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from reft_core.adapter import Adapter, decode_adapter
from reft_core.convert import ConvertOptions, convert
from tests.reft_core.convert.support import Case, case_description, case_names, change_json, options

LLAMA_CASES = case_names("adapterhub")
GPT2_CASES = case_names("adapterhub", own_base=True)
SOURCE = "model.layers.0.reft_layer.refts.fixture.units.0.learned_source.weight"


def case_options(case: Case, **given: Any) -> ConvertOptions:
    """Of ReFT the method is not recorded in its folder, but in the case."""
    defaults = {"base": case_description(case), "method": case.facts.get("method")}
    return options(**(defaults | given))


def converted(case: Case, **given: Any) -> Adapter:
    return decode_adapter(convert(case.adapter_folder, "adapters", case_options(case, **given)))


def damaged(change: Any) -> Any:
    """What makes a change to the tensors of the file at a path."""

    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def change_config(folder: Path, fields: dict[str, Any]) -> None:
    """Replace some of the method's own settings."""
    path = folder / "adapter_config.json"
    change_json(path, {"config": json.loads(path.read_text())["config"] | fields})
