"""Adapters saved by pyreft, read, and a way to change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reft_core.adapter import Adapter, decode_adapter
from reft_core.convert import ConvertOptions, convert
from tests.reft_core.convert.support import Case, options

CONVENTIONS = {
    "length": {"anchor": "prompt_end", "cap": "half"},
    "length-1": {"anchor": "before_last", "cap": "half"},
    "uncapped": {"anchor": "prompt_end", "cap": "shared"},
}
OUR_ACTIVATION = {None: "identity"}


def case_options(case: Case, **given: Any) -> ConvertOptions:
    """What pyreft does not record, from the case's description."""
    facts = case.facts
    known: dict[str, Any] = {"positions": facts["positions"], **CONVENTIONS[facts["last"]]}
    if facts["method"] not in ("consreft", "lobireft"):
        known["activation"] = OUR_ACTIVATION.get(facts["activation"], facts["activation"])
    return options(**(known | given))


def converted(case: Case, **given: Any) -> Adapter:
    return decode_adapter(convert(case.adapter_folder, "pyreft", case_options(case, **given)))


def edit_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
