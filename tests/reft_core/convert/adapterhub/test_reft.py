"""AdapterHub's own outputs, reproduced from its folders; and its ReFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_core.convert import convert
from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    InvalidRequest,
    ReftError,
    UnsupportedFeature,
)
from tests.reft_core.convert.adapterhub.cases import (
    GPT2_CASES,
    LLAMA_CASES,
    SOURCE,
    change_config,
    converted,
    damaged,
)
from tests.reft_core.convert.support import assert_reproduces, copied, load_case, options


@pytest.mark.parametrize("name", LLAMA_CASES + GPT2_CASES)
def test_reproduces_adapters(name: str) -> None:
    case = load_case("adapterhub", name)
    assert_reproduces(converted(case), case)


@pytest.mark.parametrize(
    ("name", "rule", "tied", "units", "activation"),
    [
        ("loreft-default", "f3", True, 1, "identity"),
        ("loreft-tied", "f2+l2", True, 1, "identity"),
        ("loreft-untied-pickle", "f1+l3", False, 2, "identity"),
        ("noreft-relu-suffix", "l2", True, 1, "relu"),
        ("direft-swish", "f3", True, 1, "silu"),
    ],
)
def test_reads_what_is_recorded(
    name: str, rule: str, tied: bool, units: int, activation: str
) -> None:
    spec = converted(load_case("adapterhub", name)).spec
    assert (spec.positions.rule, spec.positions.tied) == (rule, tied)
    assert spec.positions.to_rule().num_units == units
    assert spec.sites["block_output"].activation == activation
    assert spec.training.hyperparameters["source_version"] == "adapters.1.3.0"


def test_the_name_comes_from_the_folder_unless_given() -> None:
    case = load_case("adapterhub", "direft-tied")
    assert converted(case, name=None).spec.name == "fixture"
    assert converted(case, name="mine").spec.name == "mine"


def test_direft_must_be_told_from_noreft() -> None:
    """`adapters` stores both alike; the wrong method would be another function."""
    case = load_case("adapterhub", "direft-tied")
    stored = json.loads((case.adapter_folder / "adapter_config.json").read_text())
    assert "subtract_projection" not in stored["config"]
    assert not case.facts["subtracts"]
    as_noreft = converted(case, method="noreft")
    with pytest.raises(AssertionError):
        assert_reproduces(as_noreft, case)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("loreft-tied", {"method": None}, r"^method: got None, expected 'loreft' \(subtracts"),
        ("direft-tied", {"method": None}, r"^method: got None, expected 'noreft' .*'direft'"),
        ("loreft-tied", {"method": "noreft"}, "^method: got 'noreft'.*orthogonality=True"),
        ("direft-tied", {"method": "loreft"}, "^method: got 'loreft'.*orthogonality=False"),
        ("loreft-tied", {"template": None}, "^template: got None"),
        ("loreft-tied", {"positions": "f3"}, "^positions: got 'f3', expected 'f2[+]l2'"),
        ("loreft-tied", {"tied": False}, "^tied: got False, expected True"),
        ("loreft-tied", {"anchor": "before_last"}, "^anchor: got"),
        ("loreft-tied", {"activation": "relu"}, "^activation: got 'relu', expected 'identity'"),
        ("loreft-tied", {"layers": (1,)}, "^layers: "),
        ("loreft-tied", {"phase": "all"}, "^phase: got 'all', expected 'prompt'"),
    ],
)
def test_wrong_options_are_named(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        converted(load_case("adapterhub", name), **given)


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"architecture": "gpt2"}])
def test_another_base_model_is_refused(change: dict[str, Any]) -> None:
    base = replace(options().base, **change)
    with pytest.raises(AdapterMismatch, match=r"adapter_config\.json: (hidden_size|model_type)"):
        converted(load_case("adapterhub", "loreft-tied"), base=base)


def test_a_layer_beyond_the_base_is_refused() -> None:
    base = replace(options().base, num_layers=2)
    with pytest.raises(AdapterMismatch, match="layer: got 2, expected 0 to 1"):
        converted(load_case("adapterhub", "loreft-untied-pickle"), base=base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "union"}, "architecture: got 'union', expected one of reft, lora.*MAM"),
        ({"architecture": "prompt_tuning"}, "architecture: got 'prompt_tuning', .*on no decoder"),
        ({"architecture": ["reft"]}, r"architecture: got \['reft'\]"),
        ({"architecture": None}, r"config: got \['dtype', .*expected only .*mh_adapter"),
        ({"prefix_positions": "3"}, "prefix_positions: got '3'"),
        ({"prefix_positions": True}, "prefix_positions: got True"),
        ({"prefix_positions": 0, "suffix_positions": 0}, "at least one position"),
        ({"prefix_positions": 99999}, "positions: got 'f99999"),
        ({"tied_weights": 1}, "tied_weights: got 1"),
        ({"tied_weights": False}, "unit 1"),
        ({"orthogonality": None}, "orthogonality: got None"),
        ({"non_linearity": "leakyrelu"}, "non_linearity: got 'leakyrelu', expected null or"),
        ({"non_linearity": ["relu"]}, "non_linearity"),
        ({"r": 5}, r"learned_source\.weight: got|original: got"),
        ({"r": 0}, "r: got 0, expected 1 to 24"),
        ({"layers": [0]}, r"layers: got \[0\], expected \[0, 1, 2\]"),
        ({"layers": "some"}, "layers: got 'some'"),
        ({"output_reft": False}, "output_reft: got False"),
        ({"extra": 1}, r"config: got \['extra'\]"),
        ({"subtract_projection": False}, "subtract_projection=False"),
    ],
)
def test_bad_configs_name_their_key(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", "loreft-tied"), tmp_path)
    change_config(folder, fields)
    with pytest.raises(ReftError, match=message):
        convert(folder, "adapters", options(method="loreft"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_text("hello there"), "file: got .*expected a safetensors file"),
        (lambda p: p.write_bytes(b""), "a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-8]), "a safetensors file"),
        (lambda p: p.unlink(), r"exactly one of the files adapter\.safetensors"),
        (lambda p: torch.save({}, p.parent / "pytorch_adapter.bin"), "exactly one of the files"),
        (damaged(lambda t: t.pop(SOURCE)), r"learned_source\.weight: got 'no such key"),
        (damaged(lambda t: t.update(x=torch.ones(1))), "keys: got 'x'"),
        (
            damaged(lambda t: t.update({SOURCE: torch.ones(3, 24)})),
            r"got 'shape \(3, 24\)'",
        ),
        (damaged(lambda t: t.update({SOURCE: torch.full((4, 24), torch.inf)})), "infinity"),
        (
            damaged(lambda t: t.update({SOURCE.replace("fixture", "other"): torch.ones(4, 24)})),
            "one a layer|exactly one adapter",
        ),
        (
            damaged(lambda t: t.update({SOURCE.replace("units.0", "units.1"): torch.ones(1)})),
            "keys: got",
        ),
    ],
)
def test_bad_tensor_files_name_their_key(damage: Any, message: str, tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", "loreft-tied"), tmp_path)
    damage(folder / "adapter.safetensors")
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "adapters", options(method="loreft"))


def test_a_prediction_head_is_refused(tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", "loreft-tied"), tmp_path)
    (folder / "head_config.json").write_text("{}")
    with pytest.raises(UnsupportedFeature, match=r"head_config\.json"):
        convert(folder, "adapters", options(method="loreft"))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, ""])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", "loreft-tied"), tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(
        AdapterFileInvalid, match=r"adapter_config\.json: (not valid JSON|document)"
    ):
        convert(folder, "adapters", options(method="loreft"))
