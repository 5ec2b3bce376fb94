"""LoRA adapters with random weights, as PEFT's files, for peers that serve LoRA."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 8
TARGETS = ("q_proj", "v_proj")


def write_lora(folder: Path, model: Path, seed: int) -> None:
    """An adapter of rank 8 on the query and value maps of every layer of a Llama-like model."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    size, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or size // heads
    out_sizes = {
        "q_proj": heads * head_dim,
        "v_proj": config["num_key_value_heads"] * head_dim,
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            down = torch.randn(RANK, size, generator=generator) / size**0.5
            up = torch.randn(out_sizes[target], RANK, generator=generator) * 0.1
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = up
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "base_model_name_or_path": str(model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
