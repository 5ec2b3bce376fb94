from __future__ import annotations

from pathlib import Path

import pytest

from reft_core.errors import TrainingError
from trainer.config import TrainConfig
from trainer.config.file import load_config, read_config
from trainer.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_whole_config(name: str) -> None:
    config = TrainConfig(data="x", preset=name)
    assert config.sized
    for setting, value in PRESETS[name].settings.items():
        assert setting in config.model_fields_set
        if setting not in ("template", "layers"):
            assert getattr(config, setting) == value


def test_the_papers_settings() -> None:
    found = {name: TrainConfig(data="x", preset=name) for name in PRESETS}
    commonsense, arithmetic = found["commonsense"], found["arithmetic"]
    for config in (commonsense, arithmetic):
        assert (config.positions, config.tied, config.rank) == ("f7+l7", True, 8)
        assert (config.learning_rate, config.batch_size, config.warmup_ratio) == (9e-4, 32, 0.1)
    assert (commonsense.epochs, arithmetic.epochs) == (6, 12)
    instruct = found["instruct"]
    assert (instruct.positions, instruct.tied, instruct.rank) == ("f5+l5", False, 4)
    assert (instruct.layers, instruct.batch_size, instruct.epochs) == ((3, 9, 18, 24), 128, 9)
    assert instruct.template is not None
    assert instruct.template.generation == "### Response:\n"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [  # position, rate, warm-up and epochs of table 9
        ("glue", ("f3", 6e-4, 0.1, 40)),
        ("glue-mnli", ("f1", 6e-4, 0.06, 40)),
        ("glue-mrpc", ("f3", 3e-4, 0.0, 40)),
        ("glue-cola", ("f3", 4e-4, 0.005, 60)),
        ("glue-qnli", ("f11", 9e-4, 0.1, 20)),
        ("glue-qqp", ("f11", 6e-4, 0.0, 40)),
        ("glue-rte", ("f3", 9e-4, 0.0, 60)),
        ("glue-stsb", ("f3", 6e-4, 0.03, 60)),
    ],
)
def test_the_papers_settings_of_each_glue_task(preset: str, expected: tuple[object, ...]) -> None:
    found = TrainConfig(data="x", preset=preset)
    assert (found.positions, found.learning_rate, found.warmup_ratio, found.epochs) == expected
    assert (found.rank, found.batch_size, found.layers) == (1, 32, "all")


def test_what_is_given_wins_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: x\npreset: arithmetic\nrank: 2\ntemplate: {generation: 'A:'}\n")
    config = load_config(path, ["steps=5"])
    assert (config.rank, config.positions, config.steps) == (2, "f7+l7", 5)
    assert "epochs" not in config.model_fields_set
    assert config.template is not None
    assert config.template.generation == "A:"
    assert config.template.user.startswith("Below is an instruction")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["preset=comonsense"], "preset: got 'comonsense', .*did you mean 'commonsense'"),
        (["method=lorft"], "method: got 'lorft', .*did you mean 'loreft'"),
        (["metrics=[exact_mach]"], "'exact_mach' is no metric, did you mean 'exact_match'"),
        (["columns={texts: a}"], "'texts' is no column of ours, did you mean 'text'"),
        (["learning_rat=1"], "learning_rat: unknown setting, did you mean 'learning_rate'"),
        (["input_template=x"], r"must hold \{instruction\} and \{input\}"),
    ],
)
def test_a_name_that_is_not_known_is_told_its_nearest(settings: list[str], problem: str) -> None:
    with pytest.raises(TrainingError, match=problem):
        read_config("rows.jsonl", settings)


def test_data_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.jsonl").touch()
    config = read_config("my rows.jsonl", ["rank=2"])
    assert config.data == str(tmp_path / "my rows.jsonl")
    assert config.name == "my-rows"
    assert not config.sized
    assert read_config("org/set:part").data == "org/set:part", "a hub's name stays"
    assert read_config("org/set:part").name == "set-part"
