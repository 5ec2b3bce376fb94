from __future__ import annotations

import optuna
import pytest

from reft_core.errors import TrainingError
from trainer.sections import validated
from trainer.sweep.config import SweepConfig
from trainer.sweep.space import Range, Space, settings_of


def drawn(space: Space, **params: object) -> dict:
    return space.draw(optuna.trial.FixedTrial(params))  # type: ignore[arg-type]


def test_a_draw_becomes_settings_of_a_training() -> None:
    space = Space(layers=("all", "upper_half", (0, 2)))
    chosen = drawn(
        space, first=1, last=4, layers="upper_half", tied=False, rank=2, learning_rate=1e-3
    )
    assert settings_of(chosen, 5) == {
        "positions": "f1+l4",
        "layers": (2, 3, 4),
        "tied": False,
        "rank": 2,
        "learning_rate": 1e-3,
    }
    chosen = drawn(space, first=0, last=2, layers="0,2", tied=False, rank=2, learning_rate=1e-3)
    settings = settings_of(chosen, 5)
    assert settings["positions"] == "l2"
    assert settings["layers"] == (0, 2)
    assert settings["tied"], "one side has nothing to tie"


def test_what_has_one_value_is_set_and_not_searched() -> None:
    space = Space.model_validate({"rank": 3, "first": 0, "method": "direft", "tied": True})
    assert space.searched == ["last", "layers", "learning_rate"]
    chosen = drawn(space, last=1, layers="all", learning_rate=2e-3)
    assert chosen["rank"] == 3
    assert chosen["method"] == "direft"


def test_ranges_are_whole_or_not() -> None:
    space = Space.model_validate({"rank": {"low": 1, "high": 8, "log": True}})
    assert space.rank == Range(low=1, high=8, log=True)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    values = [space.draw(study.ask()) for _ in range(30)]
    assert {type(value["rank"]) for value in values} == {int}
    assert len({value["rank"] for value in values}) > 3
    assert all(5e-4 <= value["learning_rate"] <= 1.2e-2 for value in values)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        ({"laers": ["all"]}, r"space.laers: unknown setting, did you mean 'layers'"),
        ({"layers": ["upper_haf"]}, "layers: got 'upper_haf', expected all, every:N, upper_half"),
        ({"method": ["lora", "loraft"]}, "method: got 'loraft', expected some of loreft"),
        ({"first": [0], "last": [0]}, "no position is edited"),
        ({"learning_rate": {"low": 1, "high": 0.1}}, "low must be below high"),
        ({"rank": [0]}, r"space.rank: got \[0\], expected one or more whole numbers of at least 1"),
        ({"rank": {"low": 0, "high": 4}}, "rank: got {.*}, expected .* of at least 1"),
        ({"rank": {"low": 1.5, "high": 4}}, "rank: got {.*}, expected one or more whole numbers"),
        ({"rank": []}, r"rank: got \[\], expected one or more"),
        ({"first": {"low": -3, "high": 4}}, "first: got {.*}, expected .* of at least 0"),
        ({"first": []}, r"first: got \[\], expected one or more"),
        ({"learning_rate": {"low": 0, "high": 0.1}}, "rate: got {.*}, expected .* above 0"),
        ({"learning_rate": -0.1}, "learning_rate: got -0.1, expected one or more numbers above 0"),
        ({"tied": []}, "tied: got .* at least 1 item"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(space: dict, problem: str) -> None:
    with pytest.raises(TrainingError, match=problem):
        validated(SweepConfig, "sweep", {"space": space})


def test_a_draw_of_no_position_is_an_error() -> None:
    with pytest.raises(TrainingError, match="first and last"):
        settings_of({"first": 0, "last": 0, "layers": "all"}, 3)
