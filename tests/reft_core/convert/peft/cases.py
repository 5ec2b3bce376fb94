"""Adapters saved by PEFT, read, and ways to change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from reft_core.adapter import Adapter, decode_adapter
from reft_core.convert import ConvertOptions, convert
from tests.reft_core.convert.support import Case, case_description, case_names, change_json, options

LLAMA_CASES = case_names("peft")
GPT2_CASES = case_names("peft", own_base=True)
LORA_CASES = [name for name in LLAMA_CASES + GPT2_CASES if name.startswith("lora")]
Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def case_options(case: Case, **given: Any) -> ConvertOptions:
    return options(**({"base": case_description(case)} | given))


def converted(case: Case, **given: Any) -> Adapter:
    return decode_adapter(convert(case.adapter_folder, "peft", case_options(case, **given)))


def change_config(folder: Path, fields: dict[str, Any]) -> None:
    change_json(folder / "adapter_config.json", fields)


def change_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
