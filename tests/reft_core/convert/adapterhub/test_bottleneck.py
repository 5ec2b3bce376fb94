"""Bottleneck adapters in folders of AdapterHub's `adapters`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_core.adapter import EditKey
from reft_core.convert import convert
from reft_core.errors import AdapterFileInvalid, UnsupportedFeature
from tests.reft_core.convert.adapterhub.cases import change_config, converted, damaged
from tests.reft_core.convert.support import change_json, copied, load_case, options


@pytest.mark.parametrize(
    ("name", "method", "sites", "source", "activation"),
    [
        ("series-pfeiffer", "series_adapter", ["block_output"], "output", "relu"),
        ("series-adapterplus", "series_adapter", ["block_output"], "output", "gelu"),
        ("series-houlsby", "series_adapter", ["attn_output", "mlp_output"], "output", "silu"),
        ("series-attention", "series_adapter", ["attn_output"], "output", "tanh"),
        ("parallel", "parallel_adapter", ["mlp_output"], "input", "relu"),
        ("parallel-scaled", "scaled_parallel_adapter", ["mlp_output"], "input", "silu"),
        ("parallel-learned", "scaled_parallel_adapter", ["mlp_output"], "input", "relu"),
    ],
)
def test_bottleneck_adapters_have_their_site(
    name: str, method: str, sites: list[str], source: str, activation: str
) -> None:
    spec = converted(load_case("adapterhub", name)).spec
    assert (spec.method, sorted(spec.sites)) == (method, sites)
    assert {(s.source, s.activation, s.phase) for s in spec.sites.values()} == {
        (source, activation, "all")
    }


def test_ranks_of_a_layer_follow_its_reduction_factor() -> None:
    adapter = converted(load_case("adapterhub", "series-ranks"))
    downs = [adapter.edits[EditKey(layer, "mlp_output", 0)].down for layer in range(3)]
    used = [int(down.any(dim=0).sum()) for down in downs if down is not None]
    assert used == [2, 5, 2]  # 24/12, 24/4.5, padded to 5


DOWN = "model.layers.1.output_adapters.adapters.fixture.adapter_down.0.weight"
STREAM = "stream before the layer norm"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("series-houlsby", {"use_gating": True}, "use_gating: got True, expected False"),
        ("series-houlsby", {"ln_before": True}, "ln_before: got True.*layer norm inside"),
        ("series-houlsby", {"ln_after": True}, "ln_after: got True"),
        ("series-houlsby", {"phm_layer": True}, "phm_layer: got True.*Compacter"),
        ("series-houlsby", {"inv_adapter": "nice"}, "inv_adapter: got 'nice', expected None"),
        ("series-houlsby", {"cross_adapter": True}, "cross_adapter: got True"),
        ("series-houlsby", {"original_ln_after": False}, "original_ln_after: got False.*lost"),
        ("series-houlsby", {"original_ln_before": True}, "mh_adapter: got True, expected False"),
        ("series-houlsby", {"residual_before_ln": "post_add"}, "residual_before_ln: got 'post_a"),
        ("series-houlsby", {"is_parallel": True}, f"is_parallel: got True.*{STREAM}"),
        ("series-pfeiffer", {"residual_before_ln": False}, "got False, expected True.*twice"),
        ("series-pfeiffer", {"original_ln_after": False}, "got True, expected False.*lost"),
        ("series-pfeiffer", {"residual_before_ln": "post_add"}, "residual_before_ln: got 'post_a"),
        ("parallel", {"mh_adapter": True}, "mh_adapter: got True, expected False: beside"),
        ("parallel", {"original_ln_after": False}, "original_ln_after: got False"),
        (
            "parallel",
            {"is_parallel": False, "original_ln_before": True},
            "layer_pre_ffn: got 'mlp', expected 'post_attention_layernorm'",
        ),
        ("series-interface", {"original_ln_after": False}, "original_ln_after: got False"),
        ("series-interface", {"is_parallel": True}, f"is_parallel: got True.*{STREAM}"),
    ],
)
def test_what_a_bottleneck_adapter_cannot_be_is_refused(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("adapterhub", name), tmp_path)
    change_config(folder, fields)
    with pytest.raises(UnsupportedFeature, match=message):
        convert(folder, "adapters", options())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new": 1}, r"config: got \['new'\]"),
        ({"mh_adapter": "yes"}, "mh_adapter: got 'yes', expected true or false"),
        ({"mh_adapter": False}, r"keys: got \['model.layers.1.attention_adapters"),
        ({"mh_adapter": False, "output_adapter": False}, "expected one of them"),
        ({"non_linearity": "gelu_new"}, "non_linearity: got 'gelu_new', expected one of linear"),
        ({"non_linearity": None}, "non_linearity: got None, expected one of"),
        ({"reduction_factor": 0.5}, r"reduction_factor: got 0\.5, expected a number of at least"),
        ({"reduction_factor": True}, "reduction_factor: got True"),
        ({"reduction_factor": {"1": 6}}, r"reduction_factor: got \{'1': 6\}.*layer 2"),
        ({"reduction_factor": 8}, r"got 'shape \(\d+, \d+\)', expected shape"),
        ({"scaling": 2}, "scaling: got 2, expected a number with a decimal point"),
        ({"scaling": float("nan")}, "scaling: got nan"),
        ({"scaling": "learned"}, "fixture.scaling: got 'no such key'"),
        ({"leave_out": []}, "layer 0: got 'no such adapter'"),
        ({"leave_out": [0, 1]}, "keys: got .*expected no further keys"),
    ],
)
def test_bad_bottleneck_configs_name_their_key(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("adapterhub", "series-houlsby"), tmp_path)
    change_config(folder, fields)
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "adapters", options())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(DOWN), r"adapter_down\.0\.weight: got 'no such key'"),
        (lambda t: t.clear(), "exactly one adapter"),
        (lambda t: t.update({DOWN: torch.ones(3, 23)}), r"got 'shape \(3, 23\)'"),
        (lambda t: t.update({DOWN.replace("fixture", "b"): torch.ones(1)}), "one a layer|exactly"),
        (lambda t: t.update({DOWN.replace("down.0", "down.1"): torch.ones(1)}), "keys: got"),
        (lambda t: t.update({DOWN.replace("layers.1", "layers.9"): torch.ones(1)}), "further"),
    ],
)
def test_bad_bottleneck_tensors_name_their_key(damage: Any, message: str, tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", "series-pfeiffer"), tmp_path)
    damaged(damage)(folder / "adapter.safetensors")
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "adapters", options())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_pre_ffn": "mlp.gate_proj"}, "layer_pre_ffn: got 'mlp.gate_proj', expected one"),
        ({"layer_pre_ffn": None}, "layer_pre_ffn: got None"),
        ({"layer_output_proj": "mlp.up_proj"}, "layer_output_proj: got 'mlp.up_proj'"),
        ({"layer_ln_2": "norm"}, "layer_ln_2: got 'norm', expected None"),
        ({"attn_o_proj": "q_proj"}, "attn_o_proj: got 'q_proj'"),
    ],
)
def test_other_interfaces_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", "parallel"), tmp_path)
    path = folder / "adapter_interface.json"
    change_json(path, {"interface": json.loads(path.read_text())["interface"] | fields})
    with pytest.raises(UnsupportedFeature, match=rf"adapter_interface\.json: .*{message}"):
        convert(folder, "adapters", options())
    path.write_text("[]")
    with pytest.raises(AdapterFileInvalid, match=r"adapter_interface\.json: document"):
        convert(folder, "adapters", options())


def test_layers_that_were_not_compared_are_refused(tmp_path: Path) -> None:
    """Gemma 2 has a norm behind each sublayer, which `adapters` reads from the wrong layer."""
    folder = copied(load_case("adapterhub", "series-pfeiffer"), tmp_path)
    change_json(folder / "adapter_config.json", {"model_type": "gemma2"})
    base = replace(options().base, architecture="gemma2")
    with pytest.raises(UnsupportedFeature, match="model_type: got 'gemma2', expected one of gpt2"):
        convert(folder, "adapters", options(base=base))


def test_a_model_without_classes_needs_its_interface(tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", "series-interface"), tmp_path)
    change_json(folder / "adapter_config.json", {"model_type": "qwen2"})
    base = replace(options().base, architecture="qwen2")
    assert convert(folder, "adapters", options(base=base))
    (folder / "adapter_interface.json").unlink()
    with pytest.raises(AdapterFileInvalid, match=r"adapter_interface\.json: file: got None"):
        convert(folder, "adapters", options(base=base))
