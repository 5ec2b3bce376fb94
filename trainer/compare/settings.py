"""One run's training config: the shared one, its method's habits, and a setting of its search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reft_core.errors import TrainingError, explain
from reft_core.methods import METHODS
from reft_core.methods.virtual import VIRTUAL_METHODS
from reft_core.sites import ModelDescription
from trainer.classify.config import HEAD_ONLY
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import Contender, Setting
from trainer.compare.task import Task, run_config
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainer.compare.arena import Arena

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

_HEAD = "head."
_QUERY_AND_VALUE = (
    "q_proj",
    "v_proj",
    "q",
    "v",
    "query",
    "value",
    "query_proj",
    "value_proj",
    "c_attn",
)


def training_config(
    arena: Arena, contender: Contender, setting: Setting, seed: int, comparison: CompareConfig
) -> TrainConfig:
    """The config of one run. Raises :class:`TrainingError` for a setting that makes no sense."""
    task = arena.task
    changes = setting | given_values(task, contender, comparison)
    changes |= {"seed": seed, "name": f"{contender.name}-{seed}"[:64]}
    if contender.size == "shots":
        shots_of(task, contender, setting, comparison)
        changes.pop("shots", None)
    try:
        config = _config(task, contender, changes)
        if contender.kind == "registry":
            arena.check(config)
    except TrainingError as error:
        raise TrainingError(f"settings of {contender.name}: {error.message}") from None
    return config


def shots_of(task: Task, contender: Contender, setting: Setting, comparison: CompareConfig) -> int:
    """How many examples one run shows before each prompt. Raises :class:`TrainingError`."""
    count = (setting | given_values(task, contender, comparison)).get("shots", 0)
    if type(count) is not int or count < 0:
        field = f"settings of {contender.name}: shots"
        raise TrainingError(explain(field, count, "a whole number of at least 0"), field=field)
    return count


def _config(task: Task, contender: Contender, changes: Mapping[str, Any]) -> TrainConfig:
    """The shared config with a method's habits, and ``changes`` of those."""
    given: dict[str, Any] = {name: TrainConfig.model_fields[name].default for name in _OF_A_METHOD}
    given |= {"checkpoint_seconds": 1e6, "resume": False, "report_to": "none"}
    if contender.kind == "peft":
        given["method"] = contender.name.removeprefix("peft_")
    if contender.kind == "registry":
        given |= registry_changes(task.loaded.description, contender, task.config)
    if contender.kind == "head" and task.kind == "encoder":
        given["method"] = HEAD_ONLY
        changes = {"head.learning_rate": None} | dict(changes)  # it is what is trained
    head = {n.removeprefix(_HEAD): v for n, v in changes.items() if n.startswith(_HEAD)}
    if head:
        given["head"] = task.config.head.model_dump() | head
    others = {name: value for name, value in changes.items() if not name.startswith(_HEAD)}
    return run_config(task.config, given | others)


def given_values(task: Task, contender: Contender, comparison: CompareConfig) -> dict[str, Any]:
    """What the comparison's ``settings`` settle for a method."""
    given = _given(contender, comparison)
    return {n: v for n, v in given.items() if not _is_choice(task, contender, n, v)}


def given_choices(
    task: Task, contender: Contender, comparison: CompareConfig
) -> dict[str, Sequence[Any]]:
    """What the comparison's ``settings`` list for a method's search."""
    given = _given(contender, comparison)
    return {n: v for n, v in given.items() if _is_choice(task, contender, n, v)}


def _given(contender: Contender, comparison: CompareConfig) -> dict[str, Any]:
    """A method's ``settings``, those of the head by their whole names."""
    given = dict(comparison.settings.get(contender.name, {}))
    head = given.pop("head", {})
    if not isinstance(head, dict):
        allowed = "a mapping of the head's settings"
        raise TrainingError(explain(f"settings of {contender.name}: head", head, allowed))
    return given | {f"{_HEAD}{name}": value for name, value in head.items()}


def _is_choice(task: Task, contender: Contender, name: str, value: Any) -> bool:
    """Whether a value is a list to choose from: one that is not itself a value of the setting.

    So ``layers: [0, 3]`` are two layers, and ``layers: [all, [0, 3]]`` two choices.
    """
    if not isinstance(value, list) or not value:
        return False
    if name == "shots":
        return True
    try:
        _config(task, contender, {name: value})
    except TrainingError:
        return True
    return False


def check_settings(comparison: CompareConfig) -> None:
    """Raise :class:`TrainingError` for settings of a method that is not compared."""
    for name in comparison.settings:
        if name not in comparison.methods:
            allowed = "some of " + ", ".join(comparison.methods)
            raise TrainingError(explain("settings", name, allowed), field="settings")


def longest_prefix(contenders: Iterable[Contender], comparison: CompareConfig) -> int:
    """Most virtual tokens that a method puts before a prompt."""
    lengths = [0]
    for contender in contenders:
        if contender.size == "prefix_length":
            given = comparison.settings.get(contender.name, {}).get("prefix_length")
            lengths += [n for n in _listed(given) if isinstance(n, int)] or contender.sizes
    return max(lengths)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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
    return changes | {"sites": sites_for(model, contender.name)}


def sites_for(model: ModelDescription, method: str) -> tuple[str, ...] | None:
    """Where a method usually edits, None for its own default.

    A layer of BERT is no attention and MLP but their maps. There a series adapter follows the
    last of them, as in arXiv 1902.00751, and what is parallel to an MLP is so to the layer.
    """
    kind = METHODS[method]
    if kind.sites == ("linear",):
        return linear_sites(model, method)
    if kind.sites[0] in model.sites:
        return None
    width = model.hidden_size
    narrowing = [site for site, (wide, out) in model.sites.items() if out == width and wide > width]
    return tuple(narrowing[-1:] if kind.source == "output" else ["block_output"])


def linear_sites(model: ModelDescription, method: str) -> tuple[str, ...]:
    """Query and value maps, LoRA's usual place; every linear map for BitFit."""
    linear = tuple(site for site in model.sites if site.startswith("linear:"))
    if method == "bitfit":
        return linear
    chosen = tuple(site for site in linear if site.rpartition(".")[2] in _QUERY_AND_VALUE)
    return chosen or linear
