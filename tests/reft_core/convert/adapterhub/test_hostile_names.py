"""Names of tensors that would keep a careless pattern busy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reft_core.convert import convert
from reft_core.errors import ReftError
from tests.reft_core.convert.adapterhub.cases import SOURCE
from tests.reft_core.convert.support import copied, load_case, options

LAYERS_OF_DIGITS = {
    "loreft-tied": SOURCE.replace(".0.reft_layer", "." + "1" * 5000 + ".reft_layer"),
    "series-pfeiffer": f"model.layers.{'1' * 5000}.output_adapters.adapters.fixture.scaling",
    "lora": f"model.layers.{'1' * 5000}.self_attn.q_proj.loras.fixture.lora_A",
}
REPEATING = {
    "loreft-tied": "a." + "1.reft_layer.refts.x." * 100_000,
    "series-pfeiffer": "a." + "1.output_adapters.adapters.x." * 100_000,
    "lora": "a" + ".loras.x" * 100_000,
    "prefix-pickle": "a." + "prefix_tunings.x." * 100_000,
}
"""Names at which a pattern that tries every place to begin and end takes minutes or hours."""


@pytest.mark.parametrize(
    ("name", "key"), [*LAYERS_OF_DIGITS.items(), *REPEATING.items()], ids=lambda text: text[:16]
)
def test_names_made_to_be_slow_are_refused(name: str, key: str, tmp_path: Path) -> None:
    folder = copied(load_case("adapterhub", name), tmp_path)
    path = folder / "adapter.safetensors"
    if path.exists():
        save_file(load_file(path) | {key: torch.ones(1)}, path)
    else:
        path = folder / "pytorch_adapter.bin"
        torch.save(torch.load(path, weights_only=True) | {key: torch.ones(1)}, path)
    given = {"method": "loreft"} if name == "loreft-tied" else {}
    with pytest.raises(ReftError, match=r"keys: got|expected a layer's|LoRA inside") as caught:
        convert(folder, "adapters", options(**given))
    assert len(str(caught.value)) < 1000
