"""Our adapters written as PEFT folders, where they are LoRA and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from reft_core.adapter import Adapter, EditKey
from reft_core.convert.base import layers_path
from reft_core.convert.exporting import check_plain, write_spec
from reft_core.convert.peft.folder import CONFIG_FILE, KEY_PREFIX, SAFETENSORS_FILE
from reft_core.edits import Edit
from reft_core.errors import UnsupportedFeature


def to_peft(adapter: Adapter, folder: Path) -> str:
    """Write ``adapter`` as a PEFT folder; returns the ``peft_type`` it became, ``LORA``.

    α equals r everywhere, so that PEFT's scale is 1; our scale and default strength are
    multiplied into B. Ranks that padding added are left out again (``rank_pattern``).

    Raises :class:`UnsupportedFeature` naming the part that LoRA in PEFT does not have.
    """
    _check_form(adapter)
    spec = adapter.spec
    layers, transposed = layers_path(spec.base.architecture, spec.base.num_layers)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for key, edit in adapter.edits.items():
        path = f"{layers}.{key.layer}.{key.site.removeprefix('linear:')}"
        down, up = _trimmed(edit, spec.strength)
        ranks[path] = up.shape[0]
        state[f"{KEY_PREFIX}{path}.lora_A.weight"] = down.mT.contiguous()
        state[f"{KEY_PREFIX}{path}.lora_B.weight"] = up.mT.contiguous()
    config = _config(list(adapter.edits), ranks, layers, spec.base.num_layers)
    config["base_model_name_or_path"] = spec.base.name
    config["fan_in_fan_out"] = any(
        key.site.removeprefix("linear:") in transposed for key in adapter.edits
    )
    folder.mkdir(parents=True, exist_ok=False)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    safetensors.torch.save_file(state, folder / SAFETENSORS_FILE, metadata={"format": "pt"})
    write_spec(spec, folder)
    return "LORA"


def _check_form(adapter: Adapter) -> None:
    """Raise :class:`UnsupportedFeature` for whatever LoRA in PEFT cannot say."""
    check_plain(adapter, "LoRA in PEFT")
    spec = adapter.spec
    if spec.positions.rule != "prompt" or spec.positions.anchor != "prompt_end":
        raise UnsupportedFeature.because(
            "positions", f"{spec.positions.rule}, {spec.positions.anchor}", "prompt, prompt_end"
        )
    for name, site in spec.sites.items():
        if not name.startswith("linear:"):
            raise UnsupportedFeature.because("sites", name, "linear maps only, to be LoRA in PEFT")
        wanted: dict[str, Any] = {
            "source": "input",
            "parts": {"down", "up"},
            "activation": "identity",
            "phase": "all",
        }
        for field, expected in wanted.items():
            held = getattr(site, field)
            if (set(held) if field == "parts" else held) != expected:
                raise UnsupportedFeature.because(
                    f"sites.{name}.{field}", held, f"{expected}, to be LoRA in PEFT"
                )


def _trimmed(edit: Edit, strength: float) -> tuple[Tensor, Tensor]:
    """down and up without the zero ranks at their end; at least one rank is kept."""
    edit = edit.fold().times(strength)
    assert edit.down is not None
    assert edit.up is not None
    used = (edit.down.abs().amax(dim=0) > 0) | (edit.up.abs().amax(dim=1) > 0)
    rank = max(1, int(used.nonzero().max()) + 1 if used.any() else 1)
    return edit.down[:, :rank], edit.up[:rank]


def _config(
    keys: list[EditKey], ranks: dict[str, int], layers: str, num_layers: int
) -> dict[str, Any]:
    """PEFT's config: short target names if all sites are in the same layers, else full paths."""
    by_site = {key.site: {other.layer for other in keys if other.site == key.site} for key in keys}
    same_layers = len({frozenset(found) for found in by_site.values()}) == 1
    used = sorted(next(iter(by_site.values())))
    most_common = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != most_common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "r": most_common,
        "lora_alpha": most_common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(
            (site.removeprefix("linear:") for site in by_site) if same_layers else ranks
        ),
        "layers_to_transform": used if same_layers and len(used) < num_layers else None,
    }
