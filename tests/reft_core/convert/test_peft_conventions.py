"""What PEFT's files mean, stated with plain transformers and held against PEFT's own outputs.

Our importer for PEFT needs sites that the adapter file does not have yet. Until then these
tests keep its conventions: they rebuild each fixture's logits from the stored tensors.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.fixtures.tiny import base_model
from tests.reft_core.convert.support import FIXTURES, TOLERANCE, Case, load_case


def files(case: Case) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder: Path = case.adapter_folder
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that is the module path or its ending, else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def with_lora(config: dict[str, Any], tensors: dict[str, Tensor]) -> PreTrainedModel:
    """xWᵀ + s·(xAᵀ)Bᵀ, s = α/r or α/√r; r and α by module where a pattern says so."""
    model = base_model(FIXTURES)
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")]
        rank = pattern_value(config["rank_pattern"], path, config["r"])
        alpha = pattern_value(config["alpha_pattern"], path, config["lora_alpha"])
        assert a.shape[0] == rank
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)

        def hook(_module: Any, inputs: Any, output: Tensor, a=a, b=b, scale=scale) -> Tensor:
            return output + inputs[0] @ a.mT @ b.mT * scale

        model.get_submodule(path).register_forward_hook(hook)
    return model


def compare(case: Case, forward: Any) -> None:
    worst = 0.0
    for prompt, logits, greedy in zip(case.prompts, case.logits, case.greedy, strict=True):
        worst = max(worst, float((forward(prompt) - logits).abs().max()))
        tokens = list(prompt)
        for expected in greedy:
            assert int(forward(tokens)[-1].argmax()) == expected
            tokens.append(expected)
    assert worst <= TOLERANCE, f"largest difference {worst}"


@pytest.mark.parametrize("name", ["lora", "lora-rslora", "lora-patterns"])
@torch.no_grad()
def test_lora_scales_and_patterns(name: str) -> None:
    case = load_case("peft", name)
    model = with_lora(*files(case))
    compare(case, lambda tokens: model(input_ids=torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("name", ["prefix-tuning", "prefix-tuning-projection"])
@torch.no_grad()
def test_prefix_tuning_is_one_row_a_position(name: str) -> None:
    """Row: key of layer 0, value of layer 0, key of layer 1, …; each (kv_heads · head_dim).

    Keys are stored as attention uses them, without rotary embedding. The prompt's own
    positions begin after the prefix. A projection is multiplied out when PEFT saves.
    """
    case = load_case("peft", name)
    model = base_model(FIXTURES)
    rows = files(case)[1]["prompt_embeddings"]  # (n, 2 · layers · kv)
    n = rows.shape[0]
    heads = model.config.num_key_value_heads
    halves = rows.view(n, 2 * model.config.num_hidden_layers, heads, -1).permute(1, 2, 0, 3)

    def forward(tokens: list[int]) -> Tensor:
        cache = DynamicCache()
        for layer in range(model.config.num_hidden_layers):
            cache.update(halves[2 * layer][None], halves[2 * layer + 1][None], layer)
        positions = torch.arange(n, n + len(tokens))[None]
        return model(
            input_ids=torch.tensor([tokens]), past_key_values=cache, position_ids=positions
        ).logits[0]

    compare(case, forward)


@torch.no_grad()
def test_prompt_tuning_is_embeddings_before_the_prompt() -> None:
    case = load_case("peft", "prompt-tuning")
    model = base_model(FIXTURES)
    virtual = files(case)[1]["prompt_embeddings"]  # (n, d)

    def forward(tokens: list[int]) -> Tensor:
        words = model.get_input_embeddings()(torch.tensor(tokens))
        return model(inputs_embeds=torch.cat([virtual, words])[None]).logits[0, len(virtual) :]

    compare(case, forward)
