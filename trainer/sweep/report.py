"""What a sweep leaves: the report for people, the same for programs, and the best config."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
import yaml
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from reft_core.adapter import write_durably
from trainer.config import TrainConfig
from trainer.sections import validated
from trainer.sweep.config import SweepConfig
from trainer.sweep.run import to_json
from trainer.sweep.study import FACTS
from trainer.sweep.trial import SETTINGS

_FEWEST_FOR_IMPORTANCE = 4
_TOP_TRIALS = 5
"""Of which the evaluator's estimate of good settings is made, at least."""
_SHOWN = 15


def write_report(
    study: optuna.Study, config: TrainConfig, settings: SweepConfig, command: str
) -> dict[str, Any]:
    """Write ``report.md``, ``report.json`` and ``best.yaml`` into the sweep's folder.

    Returns the settings of the best trial, none if no trial was completed. ``config`` is the
    one the sweep was given, its test rows included, so that ``reft train best.yaml`` tests.
    """
    best = best_trial(study)
    importances = param_importances(study)
    found: dict[str, Any] = {}
    if best is not None:
        found = best_settings(best)
        write_durably(settings.out / "best.yaml", to_yaml(config, found, best, command).encode())
    document = {
        "command": command,
        "sweep": settings.model_dump(mode="json", exclude={"storage"}),  # it may hold a password
        "task": study.user_attrs.get(FACTS),
        "best": None if best is None else {"number": best.number, "value": best.value, **found},
        "importances": importances,
        "trials": to_json(study),
    }
    markdown = to_markdown(study, settings, best, found, importances, command)
    write_durably(settings.out / "report.md", markdown.encode())
    text = json.dumps(document, indent=1, ensure_ascii=False)
    write_durably(settings.out / "report.json", text.encode())
    return found


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The completed trial of the best objective."""
    return next(iter(_best_first(study)), None)


def _best_first(study: optuna.Study) -> list[FrozenTrial]:
    """The completed trials, the earlier one first among equals."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    return sorted(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def best_settings(best: FrozenTrial) -> dict[str, Any]:
    """What a trial that was trained changed of the training config."""
    return dict(best.user_attrs[SETTINGS])


def param_importances(study: optuna.Study) -> dict[str, float]:
    """Share of each searched setting in what sets good trials apart; none of a few trials.

    By PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), which needs no further package. Of
    few trials it says little.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < _FEWEST_FOR_IMPORTANCE:
        return {}
    quantile = min(0.5, max(0.1, _TOP_TRIALS / len(done)))
    known = inspect.signature(PedAnovaImportanceEvaluator).parameters
    name = "target_quantile" if "target_quantile" in known else "baseline_quantile"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the evaluator is young, and what it cannot tell
        evaluator = PedAnovaImportanceEvaluator(**{name: quantile})
        try:
            found = get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # every trial is as good as the others
            return {}
    return {key: float(value) for key, value in found.items()}


def to_yaml(config: TrainConfig, found: Mapping[str, Any], best: FrozenTrial, command: str) -> str:
    """The best config as a file that ``reft train`` takes, with paths from the root."""
    values = {name: getattr(config, name) for name in config.model_fields_set} | dict(found)
    complete = validated(TrainConfig, "best", values)
    paths = {n: v.absolute() for n in values if hasattr(v := getattr(complete, n), "absolute")}
    document = complete.model_copy(update=paths).model_dump(mode="json", include=set(values))
    head = (
        f"# Trial {best.number}, objective {best.value:.6g} on the validation rows.\n# {command}\n"
    )
    return head + yaml.safe_dump(document, sort_keys=True, allow_unicode=True)


def to_markdown(
    study: optuna.Study,
    settings: SweepConfig,
    best: FrozenTrial | None,
    found: Mapping[str, Any],
    importances: Mapping[str, float],
    command: str,
) -> str:
    """The report for people."""
    trials = study.get_trials(deepcopy=False)
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    unit = "validation loss" if settings.objective == "loss" else "validation accuracy"
    parts = [
        "# Sweep",
        f"{len(trials)} trials: {counts[TrialState.COMPLETE]} completed, "
        f"{counts[TrialState.PRUNED]} given up early, {counts[TrialState.FAIL]} failed. "
        f"Objective: {unit}. No test row was read.",
    ]
    if best is not None:
        lines = "\n".join(f"- {name}: {shown(value)}" for name, value in found.items())
        parts.append(f"## Best: trial {best.number}, {unit} {best.value:.4g}\n\n{lines}")
        parts.append("`reft train best.yaml` trains it again, and tests it if there are test rows.")
    if importances:
        rows = "\n".join(f"| {name} | {100 * share:.0f} % |" for name, share in importances.items())
        parts.append(
            "## Importance\n\nShare of each setting in what sets the better trials apart "
            f"(PED-ANOVA).\n\n| setting | share |\n| --- | --- |\n{rows}"
        )
    parts.append(_trial_table(study, settings, unit))
    parts.append(f"Made by `{command}`.\n")
    return "\n\n".join(parts)


def _trial_table(study: optuna.Study, settings: SweepConfig, unit: str) -> str:
    names = settings.space.searched
    header = ["trial", unit, "parameters", "training, s", *names]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for trial in _best_first(study)[:_SHOWN]:
        cells = [
            str(trial.number),
            f"{trial.value:.4g}",
            f"{trial.user_attrs.get('num_parameters', 0):,}",
            f"{trial.user_attrs.get('training_seconds', 0):.0f}",
            *(shown(trial.params.get(name, "")) for name in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "## The best trials\n\n" + "\n".join(lines)


def shown(value: object) -> str:
    """A setting's value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
