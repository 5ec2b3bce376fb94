"""LoRA in folders of AdapterHub's `adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reft_core.adapter import EditKey, decode_adapter
from reft_core.convert import convert
from reft_core.errors import AdapterFileInvalid, AdapterMismatch, ReftError, UnsupportedFeature
from tests.reft_core.convert.adapterhub.cases import change_config, converted, damaged
from tests.reft_core.convert.support import change_json, copied, load_case, options


def test_lora_follows_the_stored_names() -> None:
    """``intermediate_lora`` of a Llama is on down_proj, of other models on up_proj."""
    spec = converted(load_case("adapterhub", "lora-all-pickle")).spec
    attention = [f"linear:self_attn.{name}_proj" for name in "kqv"]
    assert sorted(spec.sites) == ["linear:mlp.down_proj", "linear:mlp.up_proj", *attention]
    assert {site.layers for site in spec.sites.values()} == {(0, 2)}
    assert {site.phase for site in spec.sites.values()} == {"all"}
    assert (spec.method, spec.positions.rule) == ("lora", "prompt")


def test_a_fused_map_holds_its_matrices_side_by_side() -> None:
    adapter = converted(load_case("adapterhub", "lora-gpt2"))  # q and v, rank 2 each
    up = adapter.edits[EditKey(0, "linear:attn.c_attn", 0)].up
    assert up is not None
    assert up.shape == (4, 48)
    q, k, v = up.chunk(3, dim=1)
    assert not k.any()
    assert not q[2:].any()
    assert not v[:2].any()


def test_lora_of_old_versions_is_not_scaled(tmp_path: Path) -> None:
    """`adapters` reads α as r there, because it was trained without α/r."""
    case = load_case("adapterhub", "lora")  # r 4, α 6
    folder = copied(load_case("adapterhub", "lora"), tmp_path)
    path = folder / "adapter_config.json"
    key = EditKey(0, "linear:self_attn.q_proj", 0)
    scaled = converted(case).edits[key].up
    assert scaled is not None
    for version, factor in (("1.0.1", 1.5), ("0.2.2", 1.5), ("1.1.0", 1.0), ("1.10.0", 1.0)):
        change_json(path, {"version": f"adapters.{version}"})
        up = decode_adapter(convert(folder, "adapters", options())).edits[key].up
        torch.testing.assert_close(up, scaled / factor)


LORA_A = "model.layers.1.self_attn.q_proj.loras.fixture.lora_A"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"use_gating": True}, UnsupportedFeature, "use_gating: got True, expected False: a gate"),
        ({"use_dora": True}, UnsupportedFeature, "use_dora: got True, expected False: DoRA"),
        ({"vera_d": 0.1}, UnsupportedFeature, r"vera_d: got 0\.1, expected None: VeRA"),
        ({"vera_b": 0.0}, UnsupportedFeature, r"vera_b: got 0\.0, expected None: VeRA"),
        ({"composition_mode": "scale"}, UnsupportedFeature, "got 'scale', expected 'add'.*IA"),
        ({"architecture": "mtl_lora"}, UnsupportedFeature, "architecture: got 'mtl_lora'"),
        ({"new": 1}, AdapterFileInvalid, r"config: got \['new'\]"),
        ({"r": 0}, AdapterFileInvalid, "r: got 0, expected 1 to 1024"),
        ({"r": True}, AdapterFileInvalid, "r: got True"),
        ({"r": 3}, AdapterFileInvalid, r"lora_A: got 'shape \(4, 24\)', expected shape \(3, 24"),
        ({"alpha": "8"}, AdapterFileInvalid, "alpha: got '8', expected a positive number"),
        ({"alpha": 0}, AdapterFileInvalid, "alpha: got 0"),
        ({"attn_matrices": ["q", "o"]}, AdapterFileInvalid, r"attn_matrices: got \['q', 'o'\]"),
        ({"attn_matrices": "qv"}, AdapterFileInvalid, "attn_matrices: got 'qv'"),
        (
            {"attn_matrices": ["q"]},
            AdapterFileInvalid,
            r"expected maps of \['q'\] and 0 of the MLP",
        ),
        ({"attn_matrices": ["q", "k"]}, AdapterFileInvalid, r"expected maps of \['q', 'k'\] and 0"),
        ({"selfattn_lora": False}, AdapterFileInvalid, r"expected maps of \[\] and 0 of the MLP"),
        ({"selfattn_lora": 1}, AdapterFileInvalid, "selfattn_lora: got 1, expected true or false"),
        (
            {"output_lora": True},
            AdapterFileInvalid,
            r"expected maps of \['q', 'v'\] and 1 of the MLP",
        ),
        ({"leave_out": [1]}, AdapterFileInvalid, r"layer 1: got .*expected LoRA on \[\]"),
        ({"leave_out": [3]}, AdapterMismatch, "leave_out: layer: got 3, expected 0 to 2"),
        ({"leave_out": "1"}, AdapterFileInvalid, "leave_out: got '1'"),
    ],
)
def test_what_lora_cannot_be_is_refused(
    fields: dict[str, Any], error: type[ReftError], message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("adapterhub", "lora"), tmp_path)
    change_config(folder, fields)
    with pytest.raises(error, match=message):
        convert(folder, "adapters", options())


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda t: t.pop(LORA_A), AdapterFileInvalid, "lora_A: got 'no such key'"),
        (lambda t: t.clear(), AdapterFileInvalid, "exactly one adapter"),
        (lambda t: t.update(x=torch.ones(1)), AdapterFileInvalid, "keys: got 'x'"),
        (lambda t: t.update({LORA_A: torch.ones(4, 23)}), AdapterFileInvalid, r"\(4, 23\)"),
        (lambda t: t.update({LORA_A: torch.full((4, 24), torch.nan)}), AdapterFileInvalid, "NaN"),
        (
            lambda t: t.update({LORA_A.replace("fixture", "b"): torch.ones(4, 24)}),
            AdapterFileInvalid,
            r"got \['b', 'fixture'\], expected exactly one adapter",
        ),
        (
            lambda t: t.update({LORA_A.replace("q_proj", "z_proj"): torch.ones(4, 24)}),
            AdapterMismatch,
            "z_proj.*expected a layer's .*q_proj",
        ),
        (
            lambda t: t.update({"model.lm_head.loras.fixture.lora_A": torch.ones(4, 24)}),
            UnsupportedFeature,
            "expected LoRA inside the decoder layers",
        ),
    ],
)
def test_bad_lora_tensors_name_their_key(
    damage: Any, error: type[ReftError], message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("adapterhub", "lora"), tmp_path)
    damaged(damage)(folder / "adapter.safetensors")
    with pytest.raises(error, match=message):
        convert(folder, "adapters", options())
