"""Adapters written as PEFT folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reft_core.adapter import Adapter, EditKey, decode_adapter
from reft_core.convert import convert, to_peft, to_pyreft
from reft_core.convert.assembling import Conventions, assemble
from reft_core.edits import Edit
from reft_core.errors import UnsupportedFeature
from reft_core.spec import PositionSpec
from tests.reft_core.convert.peft.cases import LORA_CASES, case_options, converted
from tests.reft_core.convert.support import load_case, options


@pytest.mark.parametrize("name", LORA_CASES)
def test_goes_back_to_peft_and_returns_the_same(name: str, tmp_path: Path) -> None:
    case = load_case("peft", name)
    adapter = converted(case)
    assert to_peft(adapter, tmp_path / "out") == "LORA"
    again = decode_adapter(convert(tmp_path / "out", "peft", case_options(case)))
    same = {"training": adapter.spec.training}
    assert again.spec.model_copy(update=same) == adapter.spec
    assert set(again.edits) == set(adapter.edits)
    for key, edit in adapter.edits.items():
        for part, tensor in edit.parts():
            assert torch.equal(getattr(again.edits[key], part), tensor), (key, part)


def test_the_written_folder_has_pefts_ranks_and_names(tmp_path: Path) -> None:
    case = load_case("peft", "lora-patterns")
    to_peft(converted(case), tmp_path / "out")
    theirs = load_file(case.adapter_folder / "adapter_model.safetensors")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 2]
    assert config["fan_in_fan_out"] is False
    case = load_case("peft", "lora-gpt2")
    to_peft(converted(case), tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]


def _lora(key: EditKey, rank: int = 2, **fields: Any) -> tuple[EditKey, Edit]:
    in_size, out_size = options().base.sites[key.site]
    edit = Edit(down=torch.randn(in_size, rank), up=torch.randn(rank, out_size), source="input")
    return key, replace(edit, **fields)


def _adapter(
    *edits: tuple[EditKey, Edit], rule: str = "prompt", phase: Any = "all", **given: Any
) -> Adapter:
    conventions = Conventions("lora", PositionSpec(rule=rule), None, "x", "test", "a.bin", phase)
    return decode_adapter(assemble(dict(edits), conventions, options(**given)).to_bytes())


def test_sites_in_different_layers_and_strength_survive(tmp_path: Path) -> None:
    adapter = _adapter(
        _lora(EditKey(0, "linear:self_attn.q_proj", 0)),
        _lora(EditKey(1, "linear:self_attn.q_proj", 0), rank=3),
        _lora(EditKey(2, "linear:mlp.down_proj", 0), scale=0.5),
        strength=0.25,
    )
    to_peft(adapter, tmp_path / "out")
    again = decode_adapter(convert(tmp_path / "out", "peft", options()))
    assert again.spec.strength == 1
    for key, edit in adapter.edits.items():
        assert edit.up is not None
        torch.testing.assert_close(again.edits[key].up, edit.up * 0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: converted(load_case("peft", "prefix-tuning")), "prefix: got 'kv', expected none"),
        (
            lambda: converted(load_case("peft", "lora"), phase="prompt"),
            r"sites\.linear:self_attn\.\w_proj\.phase: got 'prompt', expected all",
        ),
        (
            lambda: _adapter(_lora(EditKey(0, "mlp_output", 0))),
            "sites: got 'mlp_output', expected linear maps only",
        ),
        (
            lambda: _adapter(_lora(EditKey(0, "linear:self_attn.q_proj", 0), source="output")),
            r"source: got 'output', expected input",
        ),
        (
            lambda: _adapter(
                _lora(EditKey(0, "linear:self_attn.q_proj", 0), bias=torch.ones(2))
            ),
            r"parts: got \('down', 'up', 'bias'\)",
        ),
        (
            lambda: _adapter(_lora(EditKey(0, "linear:self_attn.q_proj", 0), activation="relu")),
            "activation: got 'relu'",
        ),
        (
            lambda: _adapter(_lora(EditKey(0, "linear:self_attn.q_proj", 0)), rule="f2"),
            "positions: got 'f2, prompt_end'",
        ),
    ],
)  # fmt: skip
def test_what_peft_cannot_say_is_refused_by_name(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match=message):
        to_peft(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pyreft_cannot_say_a_prefix(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="prefix: got 'kv'"):
        to_pyreft(converted(load_case("peft", "prefix-tuning")), tmp_path / "out")
