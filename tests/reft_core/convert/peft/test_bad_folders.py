"""Damaged and hostile PEFT folders, and settings that have no form here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reft_core.convert import convert
from reft_core.errors import AdapterFileInvalid, AdapterMismatch, ReftError, UnsupportedFeature
from tests.reft_core.convert.peft.cases import Q, change_config, change_tensors
from tests.reft_core.convert.support import copied, load_case, options


def _one() -> torch.Tensor:
    return torch.ones(1)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', expected one of LORA, PREFIX_TUNING"),
        ({"peft_type": "P_TUNING"}, "peft_type: got 'P_TUNING'"),
        ({"peft_type": None}, "peft_type: got None"),
        ({"peft_type": ["LORA"]}, r"peft_type: got \['LORA'\]"),
        ({"use_dora": True}, "use_dora: got True, expected none: DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: got \['lm_head'\], expected none"),
        ({"bias": "lora_only"}, "bias: got 'lora_only', expected 'none'"),
        ({"lora_bias": True}, "lora_bias: got True"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices: got \[1\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: got"),
        ({"target_parameters": ["x"]}, "target_parameters: got"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: got"),
        ({"use_qalora": True}, "use_qalora: got True, expected none: a setting"),
        ({"some_new_option": 3}, "some_new_option: got 3, expected none: a setting"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', expected one that"),
        ({"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS', expected 'CAUSAL_LM'"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("peft", "lora"), tmp_path)
    change_config(folder, fields)
    with pytest.raises(UnsupportedFeature, match=rf"adapter_config\.json: {message}"):
        convert(folder, "peft", options())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: got 0, expected a positive number"),
        ({"r": "4"}, "r: got '4'"),
        ({"r": 2.5}, "r: got 2.5, expected a whole number"),
        ({"r": 5}, r"lora_A\.weight: got 'shape \(4, 24\)', expected shape \(5, 24\)"),
        ({"lora_alpha": True}, "lora_alpha: got True"),
        ({"lora_alpha": 1e400}, "lora_alpha: got inf"),
        ({"use_rslora": "yes"}, "use_rslora: got 'yes'"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": [1]}, r"rank_pattern: got \[1\]"),
        ({"rank_pattern": {"q_proj": "x"}}, r"rank_pattern\.q_proj: got 'x'"),
        ({"rank_pattern": {"q_proj": 3}}, r"q_proj\.lora_A\.weight: got 'shape"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: got '\('"),
        ({"alpha_pattern": {"x" * 300: 3}}, "alpha_pattern: got"),
        ({"target_modules": 3}, "target_modules: got 3"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, r"k_proj\.lora_A\.weight: got 'no"),
        ({"target_modules": ["q_proj"]}, "target_modules: got .* matches .*v_proj"),
        ({"target_modules": "all-linear"}, None),
        ({"layers_to_transform": [0, 1]}, "one that matches .*layers.2"),
        ({"layers_to_transform": "x"}, "layers_to_transform: got 'x'"),
    ],
)
def test_bad_configs_name_their_key(
    fields: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    case = load_case("peft", "lora")
    folder = copied(case, tmp_path)
    change_config(folder, fields)
    if message is None:
        convert(folder, "peft", options())
        return
    with pytest.raises(AdapterFileInvalid, match=message) as caught:
        convert(folder, "peft", options())
    assert "adapter_" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda t: t.pop(Q), AdapterFileInvalid, r"q_proj\.lora_A\.weight: got 'no such key'"),
        (
            lambda t: [t.pop(key) for key in list(t) if "layers.1.self_attn.q_proj" in key],
            AdapterFileInvalid,
            r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: got 'no such key'",
        ),
        (lambda t: t.clear(), AdapterFileInvalid, "keys: got .*expected at least one pair"),
        (lambda t: t.update(x=torch.ones(1)), AdapterFileInvalid, "keys: got 'x', expected base"),
        (lambda t: t.update({Q: torch.ones(4, 23)}), AdapterFileInvalid, r"shape \(4, 23\)"),
        (lambda t: t.update({Q: torch.full((4, 24), torch.nan)}), AdapterFileInvalid, "NaN"),
        (lambda t: t.update({Q: torch.ones(4, 24).int()}), AdapterFileInvalid, "int32"),
        (
            lambda t: t.update({Q.replace("model.layers", "encoder.layers"): torch.ones(4, 24)}),
            AdapterFileInvalid,
            "modules of one list of layers",
        ),
        (
            lambda t: t.update({Q.replace("q_proj", "z_proj"): torch.ones(4, 24)}),
            AdapterMismatch,
            r"z_proj.*expected a layer's .*q_proj",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 24)}),
            UnsupportedFeature,
            "got 'lm_head', expected LoRA inside the decoder layers",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": _one()}),
            UnsupportedFeature,
            "LoRA on an embedding",
        ),
        (
            lambda t: t.update({Q.replace("lora_A.weight", "lora_magnitude_vector"): _one()}),
            UnsupportedFeature,
            "got 'DoRA'",
        ),
        (
            lambda t: t.update({Q.replace("lora_A.weight", "lora_B.bias"): _one()}),
            UnsupportedFeature,
            "a bias on B",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": _one()}),
            UnsupportedFeature,
            "weights of the base model",
        ),
    ],
)
def test_bad_lora_tensors_name_their_key(
    damage: Any, error: type[ReftError], message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("peft", "lora"), tmp_path)
    change_tensors(folder, damage)
    with pytest.raises(error, match=message) as caught:
        convert(folder, "peft", options())
    assert "adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize("name", ["prefix-tuning", "prompt-tuning"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.clear(), "prompt_embeddings: got 'no such key'"),
        (
            lambda t: t.update(prompt_embeddings=torch.ones(4, 5)),
            r"prompt_embeddings: got 'shape \(4, 5\)'",
        ),
        (lambda t: t.update(x=torch.ones(1)), r"keys: got \['x'\], expected no further"),
    ],
)
def test_bad_prompt_tensors_name_their_key(
    name: str, damage: Any, message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("peft", name), tmp_path)
    change_tensors(folder, damage)
    with pytest.raises(AdapterFileInvalid, match=rf"adapter_model\.safetensors: {message}"):
        convert(folder, "peft", options())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": None}, "num_virtual_tokens: got None"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: got 0, expected 1 to"),
        ({"num_virtual_tokens": 5}, r"prompt_embeddings: got 'shape \(4, 72\)', expected"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: got 2, expected 1"),
        ({"token_dim": 24}, "token_dim: got 24, expected 12"),
        ({"modules_to_save": ["score"]}, "modules_to_save: got"),
    ],
)
def test_bad_prefix_configs_name_their_key(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copied(load_case("peft", "prefix-tuning"), tmp_path)
    change_config(folder, fields)
    with pytest.raises(ReftError, match=message):
        convert(folder, "peft", options())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "exactly one of the files adapter_"),
        (lambda f: torch.save({}, f / "adapter_model.bin"), "exactly one of the files adapter_"),
        (lambda f: (f / "adapter_config.json").unlink(), "exactly one of the files adapter_config"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: _truncate(f / "adapter_model.safetensors"), "expected a safetensors file"),
    ],
)
def test_bad_files_are_named(damage: Any, message: str, tmp_path: Path) -> None:
    folder = copied(load_case("peft", "lora"), tmp_path)
    damage(folder)
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "peft", options())
