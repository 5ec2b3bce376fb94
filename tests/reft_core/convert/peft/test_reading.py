"""PEFT's own outputs, reproduced by its folders converted to our file."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_core.adapter import decode_adapter
from reft_core.convert import convert
from reft_core.errors import AdapterFileInvalid
from reft_core.spec import PositionSpec
from tests.reference.slow import reference_logits
from tests.reft_core.convert.peft.cases import (
    GPT2_CASES,
    LLAMA_CASES,
    case_options,
    change_config,
    change_tensors,
    converted,
)
from tests.reft_core.convert.support import assert_reproduces, copied, load_case, tiny_base


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
    folder = copied(case, tmp_path)
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
    folder = copied(case, tmp_path)
    torch.manual_seed(0)
    change_tensors(
        folder,
        lambda t: t.update(
            {k: torch.randn(20, 24) if "_A" in k else torch.randn(len(v), 20) for k, v in t.items()}
        ),
    )
    change_config(folder, {"r": 20})
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
