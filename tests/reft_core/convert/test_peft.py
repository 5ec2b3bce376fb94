"""PEFT's own outputs, reproduced by its folders converted to our file, and LoRA's way back."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reft_core.adapter import Adapter, EditKey, decode_adapter
from reft_core.convert import ConvertOptions, convert, to_peft, to_pyreft
from reft_core.convert.assembling import Conventions, assemble
from reft_core.edits import Edit
from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    InvalidRequest,
    ReftError,
    UnsupportedFeature,
)
from reft_core.spec import PositionSpec
from tests.reference.slow import reference_logits
from tests.reft_core.convert.support import (
    Case,
    assert_reproduces,
    case_description,
    case_names,
    load_case,
    options,
    tiny_base,
)

LLAMA_CASES = case_names("peft")
GPT2_CASES = case_names("peft", own_base=True)
LORA_CASES = [name for name in LLAMA_CASES + GPT2_CASES if name.startswith("lora")]
Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def case_options(case: Case, **given: Any) -> ConvertOptions:
    return options(**({"base": case_description(case)} | given))


def converted(case: Case, **given: Any) -> Adapter:
    return decode_adapter(convert(case.adapter_folder, "peft", case_options(case, **given)))


@pytest.mark.parametrize("name", LLAMA_CASES + GPT2_CASES)
def test_reproduces_peft(name: str) -> None:
    case = load_case("peft", name)
    assert_reproduces(converted(case), case)


def test_the_cases_cover_every_type_and_both_families() -> None:
    kinds = {load_case("peft", name).facts["peft_type"] for name in LLAMA_CASES}
    assert kinds == {"LORA", "PREFIX_TUNING", "PROMPT_TUNING"}
    assert len(GPT2_CASES) == 2


def test_sites_ranks_and_layers_follow_the_patterns() -> None:
    spec = converted(load_case("peft", "lora-patterns")).spec
    assert spec.method == "lora"
    assert spec.positions == PositionSpec(rule="prompt")
    assert {name.rpartition(".")[2]: site.rank for name, site in spec.sites.items()} == {
        "q_proj": 4,
        "down_proj": 3,  # 2 in layer 0, padded
        **dict.fromkeys(["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], 2),
    }
    assert {site.layers for site in spec.sites.values()} == {(0, 2)}
    assert {site.phase for site in spec.sites.values()} == {"all"}
    assert {site.source for site in spec.sites.values()} == {"input"}
    assert spec.training.hyperparameters["source_version"] == "0.21.2"


def test_prefixes_have_their_kind_and_length() -> None:
    spec = converted(load_case("peft", "prefix-tuning-projection")).spec
    assert (spec.method, spec.sites) == ("prefix_tuning", {})
    assert spec.prefix is not None
    assert (spec.prefix.kind, spec.prefix.length) == ("kv", 3)
    spec = converted(load_case("peft", "prompt-tuning")).spec
    assert spec.prefix is not None
    assert (spec.method, spec.prefix.kind, spec.prefix.length) == ("prompt_tuning", "embedding", 4)


def test_prompt_only_leaves_generated_tokens_alone() -> None:
    """As PreFT: the prompt's logits are PEFT's, the answer is decoded by the base model."""
    case = load_case("peft", "lora")
    adapter = converted(case, phase="prompt")
    assert {site.phase for site in adapter.spec.sites.values()} == {"prompt"}
    everywhere = converted(case)
    prompt = case.prompts[-1]
    ours = reference_logits(tiny_base(), prompt, len(prompt), adapter)
    assert (ours - case.logits[-1]).abs().max() <= 1e-5
    longer = [*prompt, case.greedy[-1][0]]
    prompt_only, both = (
        reference_logits(tiny_base(), longer, len(prompt), used)[-1]
        for used in (adapter, everywhere)
    )
    assert (prompt_only - both).abs().max() > 0.1


def test_a_pickled_folder_gives_the_same_adapter(tmp_path: Path) -> None:
    case = load_case("peft", "lora")
    folder = _copy(case, tmp_path)
    tensors = folder / "adapter_model.safetensors"
    torch.save(load_file(tensors), folder / "adapter_model.bin")
    tensors.unlink()
    expected = convert(case.adapter_folder, "peft", case_options(case))
    assert convert(folder, "peft", case_options(case)) == expected
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(AdapterFileInvalid, match=r"adapter_model\.bin: file: got .*weights_only"):
        convert(folder, "peft", case_options(case))


def test_weights_may_be_stored_smaller() -> None:
    case = load_case("peft", "lora")
    exact, small = converted(case), converted(case, dtype="bfloat16")
    assert small.num_bytes < exact.num_bytes
    for key, edit in exact.edits.items():
        assert edit.up is not None
        torch.testing.assert_close(small.edits[key].up, edit.up, atol=0, rtol=2**-8)


def test_a_rank_wider_than_the_map_is_multiplied_out(tmp_path: Path) -> None:
    """PEFT allows r = 20 on a map of 24 to 12; its product has rank 12."""
    case = load_case("peft", "lora")
    folder = _copy(case, tmp_path)
    torch.manual_seed(0)
    _change_tensors(
        folder,
        lambda t: t.update(
            {k: torch.randn(20, 24) if "_A" in k else torch.randn(len(v), 20) for k, v in t.items()}
        ),
    )
    _change_config(folder, {"r": 20})
    adapter = decode_adapter(convert(folder, "peft", case_options(case)))
    sites = adapter.spec.sites
    assert sites["linear:self_attn.v_proj"].rank == 12
    assert sites["linear:self_attn.q_proj"].rank == 20
    tensors = load_file(folder / "adapter_model.safetensors")
    x = torch.randn(3, 24)
    for key, edit in adapter.edits.items():
        name = f"base_model.model.model.layers.{key.layer}.{key.site.removeprefix('linear:')}"
        a, b = (tensors[f"{name}.lora_{side}.weight"] for side in "AB")
        expected = x @ a.mT @ b.mT * 8 / 20
        torch.testing.assert_close(edit.delta(expected, x), expected, atol=1e-4, rtol=1e-5)


# -- options -----------------------------------------------------------------------------------


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


# -- bad folders -------------------------------------------------------------------------------


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
    folder = _copy(load_case("peft", "lora"), tmp_path)
    _change_config(folder, fields)
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
    folder = _copy(case, tmp_path)
    _change_config(folder, fields)
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
    folder = _copy(load_case("peft", "lora"), tmp_path)
    _change_tensors(folder, damage)
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
    folder = _copy(load_case("peft", name), tmp_path)
    _change_tensors(folder, damage)
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
    folder = _copy(load_case("peft", "prefix-tuning"), tmp_path)
    _change_config(folder, fields)
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
    folder = _copy(load_case("peft", "lora"), tmp_path)
    damage(folder)
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "peft", options())


# -- back to PEFT ------------------------------------------------------------------------------


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


def _one() -> torch.Tensor:
    return torch.ones(1)


def _copy(case: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case.adapter_folder, tmp_path / "adapter"))


def _change_config(folder: Path, fields: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _change_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])
