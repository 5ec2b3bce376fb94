"""One run's training config: the shared one, its method's habits, and a setting of its search."""

from __future__ import annotations

from typing import Any

from reft_core.errors import TrainingError, explain
from reft_core.methods import METHODS
from reft_core.methods.virtual import VIRTUAL_METHODS
from reft_core.sites import ModelDescription
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import Contender, Setting
from trainer.compare.task import Task, run_config
from trainer.config import TrainConfig

_OF_A_METHOD = (
    "method",
    "rank",
    "layers",
    "positions",
    "tied",
    "scale",
    "alpha",
    "scaling",
    "prefix_length",
    "prefix_bottleneck",
    "activation",
    "sites",
    "phase",
    "subspaces",
)
"""What a shared config says of its own method. Position rule and layers hold for every method
that edits chosen prompt tokens; the rest is the method's own and left to it."""

_QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value", "query_proj", "value_proj", "c_attn")


def training_config(
    task: Task, contender: Contender, setting: Setting, seed: int, comparison: CompareConfig
) -> TrainConfig:
    """The config of one run. Raises :class:`TrainingError` for a setting that makes no sense."""
    shared = task.config
    changes: dict[str, Any] = {
        name: TrainConfig.model_fields[name].default for name in _OF_A_METHOD
    }
    changes |= {"checkpoint_seconds": 1e6, "resume": False, "report_to": "none"}
    changes |= {"seed": seed, "name": f"{contender.name}-{seed}"[:64]}
    if contender.kind == "peft":
        changes["method"] = contender.name.removeprefix("peft_")
    if contender.kind == "registry":
        changes |= registry_changes(task.loaded.description, contender, shared)
    given = comparison.settings.get(contender.name, {})
    changes |= setting | {name: v for name, v in given.items() if name not in setting}
    changes.pop("shots", None)
    try:
        config = run_config(shared, changes)
        if contender.kind == "registry":
            config.placement(task.loaded.description)
    except TrainingError as error:
        raise TrainingError(f"settings of {contender.name}: {error.message}") from None
    return config


def check_settings(comparison: CompareConfig) -> None:
    """Raise :class:`TrainingError` for settings of a method that is not compared."""
    for name in comparison.settings:
        if name not in comparison.methods:
            allowed = "some of " + ", ".join(comparison.methods)
            raise TrainingError(explain("settings", name, allowed), field="settings")


def registry_changes(
    model: ModelDescription, contender: Contender, shared: TrainConfig
) -> dict[str, Any]:
    """Where a method of ours edits: the shared rule, or every token if it is meant for those."""
    changes: dict[str, Any] = {"method": contender.name}
    if contender.every_token:
        changes["positions"] = "prompt"
    if contender.name in VIRTUAL_METHODS:
        return changes
    if not contender.every_token:
        changes |= {"positions": shared.positions, "tied": shared.tied, "layers": shared.layers}
    if METHODS[contender.name].sites == ("linear",):
        changes["sites"] = linear_sites(model, contender.name)
    return changes


def linear_sites(model: ModelDescription, method: str) -> tuple[str, ...]:
    """Query and value maps, LoRA's usual place; every linear map for BitFit."""
    linear = tuple(site for site in model.sites if site.startswith("linear:"))
    if method == "bitfit":
        return linear
    chosen = tuple(site for site in linear if site.rpartition(".")[2] in _QUERY_AND_VALUE)
    return chosen or linear
