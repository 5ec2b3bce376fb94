"""What PEFT does not record is asked for, and what it does must agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reft_core.convert import convert
from reft_core.errors import AdapterMismatch, InvalidRequest
from tests.reft_core.convert.peft.cases import case_options, change_config, converted
from tests.reft_core.convert.support import copied, load_case, options


@pytest.mark.parametrize("missing", ["template", "name"])
@pytest.mark.parametrize("name", ["lora", "prompt-tuning"])
def test_what_peft_does_not_record_is_asked_for(name: str, missing: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{missing}: got None, expected "):
        converted(load_case("peft", name), **{missing: None})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lora", {"positions": "f1"}, "^positions: got 'f1', expected 'prompt'"),
        ("lora", {"tied": False}, "^tied: got False"),
        ("lora", {"anchor": "before_last"}, "^anchor: got"),
        ("lora", {"cap": "half"}, "^cap: got"),
        ("lora", {"method": "loreft"}, "^method: got 'loreft', expected 'lora'"),
        ("lora", {"activation": "relu"}, "^activation: got 'relu'"),
        ("lora", {"layers": (1,)}, "^layers: got .*expected nothing"),
        ("prefix-tuning", {"phase": "all"}, "^phase: got 'all', expected nothing"),
        ("prompt-tuning", {"method": "lora"}, "^method: got 'lora', expected 'prompt_tuning'"),
    ],
)
def test_wrong_options_are_named(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        converted(load_case("peft", name), **given)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lora", {"num_layers": 2}, r"layer: got 2, expected 0 to 1"),
        ("lora", {"sites": {"block_output": (24, 24)}}, r"q_proj.*as in tiny"),
        ("prefix-tuning", {"num_layers": 2}, r"num_layers: got 3, expected 2"),
        ("prefix-tuning", {"num_kv_heads": 4}, r"token_dim: got 12, expected 24"),
        ("prompt-tuning", {"hidden_size": 32}, r"token_dim: got 24, expected 32"),
    ],
)
def test_another_base_model_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    case = load_case("peft", name)
    base = replace(case_options(case).base, **change)
    with pytest.raises(AdapterMismatch, match=message):
        converted(case, base=base)


def test_layers_that_the_base_lacks_are_refused(tmp_path: Path) -> None:
    folder = copied(load_case("peft", "lora"), tmp_path)
    change_config(folder, {"layers_to_transform": [0, 3]})
    with pytest.raises(AdapterMismatch, match="layers_to_transform: layer: got 3, expected 0 to 2"):
        convert(folder, "peft", options())
