"""Settings with which the LoReFT paper trained its tasks (arXiv 2404.03592v3, appendix D)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ALPACA = {
    "user": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{content}\n\n",
    "generation": "### Response:\n",
}
_REASONING: dict[str, Any] = {
    "positions": "f7+l7",
    "tied": True,
    "layers": "all",
    "rank": 8,
    "learning_rate": 9e-4,
    "batch_size": 32,
    "warmup_ratio": 0.1,
    "lr_scheduler": "linear",
}


_GLUE: dict[str, Any] = {
    "positions": "f3",
    "layers": "all",
    "rank": 1,
    "learning_rate": 6e-4,
    "batch_size": 32,
    "epochs": 40,
    "warmup_ratio": 0.1,
    "lr_scheduler": "linear",
}
"""Table 9, LoReFT on RoBERTa-base, SST-2's column. The paper's dropout of the edits is not here."""
_GLUE_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mnli": ("MNLI", {"positions": "f1", "warmup_ratio": 0.06}),
    "mrpc": ("MRPC", {"learning_rate": 3e-4, "warmup_ratio": 0.0}),
    "cola": ("CoLA", {"learning_rate": 4e-4, "warmup_ratio": 5e-3, "epochs": 60}),
    "qnli": ("QNLI", {"positions": "f11", "learning_rate": 9e-4, "epochs": 20}),
    "qqp": ("QQP", {"positions": "f11", "warmup_ratio": 0.0}),
    "rte": ("RTE", {"learning_rate": 9e-4, "warmup_ratio": 0.0, "epochs": 60}),
    "stsb": ("STS-B", {"warmup_ratio": 0.03, "epochs": 60}),
}
"""What the table's other columns have otherwise."""


@dataclass(frozen=True)
class Preset:
    """Settings that belong together; explicit ones win over them."""

    about: str
    settings: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    "commonsense": Preset(
        "multiple choice: the instruction, a line break, the answer",
        {
            **_REASONING,
            "epochs": 6,
            "template": {"user": "{content}\n", "generation": ""},
            "max_new_tokens": 32,
        },
    ),
    "arithmetic": Preset(
        "word problems with worked answers, in the Alpaca template",
        {**_REASONING, "epochs": 12, "template": _ALPACA, "max_new_tokens": 512},
    ),
    "instruct": Preset(
        "instructions with long answers, in the Alpaca template; for 32 layers of a 7B model",
        {
            "positions": "f5+l5",
            "tied": False,
            "layers": [3, 9, 18, 24],
            "rank": 4,
            "learning_rate": 9e-4,
            "batch_size": 128,
            "epochs": 9,
            "lr_scheduler": "linear",
            "template": _ALPACA,
            "input_template": "{instruction}\n\n### Input:\n{input}",
            "max_length": 768,
        },
    ),
    "glue": Preset("GLUE's SST-2; meant for encoders, as all of glue", _GLUE),
    **{
        f"glue-{task}": Preset(f"GLUE's {name}", _GLUE | settings)
        for task, (name, settings) in _GLUE_TASKS.items()
    },
}


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` over those of the preset they name; a template is filled line by line.

    An unknown preset adds nothing. Whoever says steps is not given epochs.
    """
    preset = PRESETS.get(str(values.get("preset")))
    if preset is None:
        return dict(values)
    found = {**preset.settings, **values}
    if isinstance(own := values.get("template"), dict):
        found["template"] = {**preset.settings.get("template", {}), **own}
    if values.get("steps") is not None and "epochs" not in values:
        del found["epochs"]
    return found
