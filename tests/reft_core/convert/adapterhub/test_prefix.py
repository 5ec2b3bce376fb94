"""Prefix tuning in folders of AdapterHub's `adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from reft_core.convert import convert
from reft_core.convert.base import describe_config
from reft_core.errors import AdapterFileInvalid, ReftError, UnsupportedFeature
from tests.reft_core.convert.adapterhub.cases import change_config, converted
from tests.reft_core.convert.support import change_json, copied, load_case, options


def test_keys_are_turned_to_where_the_prompt_begins() -> None:
    """Behind n virtual tokens our prompts begin at n, those of `adapters` at 0."""
    case = load_case("adapterhub", "prefix-flat-pickle")
    adapter = converted(case)
    key = "model.prefix_tuning.prefix_tunings.fixture.self_prefix.control_trans"
    stored = torch.load(case.adapter_folder / "pytorch_adapter.bin")[key].view(4, 3, 2, 2, 6)
    assert adapter.prefix is not None
    torch.testing.assert_close(adapter.prefix.values[1], stored[:, 1, 1].transpose(0, 1))
    ours, theirs = adapter.prefix.keys[1], stored[:, 1, 0].transpose(0, 1)  # (KH, n, D)
    assert (ours - theirs).abs().max() > 0.1
    pairs = [torch.complex(*part.chunk(2, dim=-1)) for part in (ours, theirs)]
    expected = 4 * torch.tensor([10000 ** (-2 * i / 6) for i in range(3)])
    turned = pairs[1] * torch.polar(torch.ones(3), expected)
    torch.testing.assert_close(pairs[0], turned)
    assert adapter.spec.training.hyperparameters["source_attention"] == "eager"


_SMALL = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8),
        LlamaConfig(**_SMALL, rope_parameters=_DYNAMIC),
        MistralConfig(**_SMALL, sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)
def test_a_prefix_needs_plain_rotary_positions(config: PreTrainedConfig, tmp_path: Path) -> None:
    base = describe_config(config, "other")
    folder = copied(load_case("adapterhub", "prefix-flat-pickle"), tmp_path)
    fields = {"hidden_size": base.hidden_size, "model_type": base.architecture}
    change_json(folder / "adapter_config.json", fields)
    with pytest.raises(UnsupportedFeature, match=r"model_type: got .*plain rotary"):
        convert(folder, "adapters", options(base=base))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"use_gating": True}, UnsupportedFeature, "use_gating: got True, expected False"),
        ({"leave_out": [1]}, UnsupportedFeature, r"leave_out: got \[1\], expected \[\]"),
        ({"new": 1}, AdapterFileInvalid, r"config: got \['new'\]"),
        ({"flat": "no"}, AdapterFileInvalid, "flat: got 'no'"),
        ({"flat": True}, AdapterFileInvalid, "control_trans: got 'no such key'"),
        ({"prefix_length": 0}, AdapterFileInvalid, "prefix_length: got 0, expected 1 to"),
        ({"prefix_length": "3"}, AdapterFileInvalid, "prefix_length: got '3'"),
        ({"prefix_length": 4}, AdapterFileInvalid, r"wte\.weight: got 'shape \(3, 24\)'"),
        (
            {"bottleneck_size": 9},
            AdapterFileInvalid,
            r"got 'shape \(8, 24\)', expected shape \(9, 24\)",
        ),
        ({"bottleneck_size": 10**6}, AdapterFileInvalid, "bottleneck_size: got 1000000"),
        ({"non_linearity": "leakyrelu"}, AdapterFileInvalid, "non_linearity: got 'leakyrelu'"),
    ],
)
def test_what_a_prefix_cannot_be_is_refused(
    fields: dict[str, Any], error: type[ReftError], message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("adapterhub", "prefix-pickle"), tmp_path)
    change_config(folder, fields)
    with pytest.raises(error, match=message):
        convert(folder, "adapters", options())


PREFIX = "model.layers.1.self_attn.prefix_tuning.pool.prefix_tunings.fixture.self_prefix."


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.update({PREFIX + "wte.weight": torch.ones(3, 24)}), "got 'other numbers'"),
        (lambda t: t.pop(PREFIX + "wte.weight"), r"wte\.weight: got 'no such key'"),
        (lambda t: t.update({PREFIX.replace("fixture", "b") + "wte.weight": 1}), "exactly one"),
        (lambda t: t.update({PREFIX + "gate.weight": torch.ones(1)}), "keys: got .*gate"),
        (lambda t: t.update({PREFIX + "control_trans": torch.ones(1)}), "no further keys"),
        (lambda t: t.clear(), "exactly one adapter"),
    ],
)
def test_bad_prefix_tensors_name_their_key(damage: Any, message: str, tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", "prefix-pickle"), tmp_path)
    path = folder / "pytorch_adapter.bin"
    tensors = torch.load(path)
    damage(tensors)
    torch.save(tensors, path)
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "adapters", options())
