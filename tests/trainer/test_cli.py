from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from reft_core.adapter import read_adapter
from reft_core.errors import TrainingError
from tests.trainer.factories import byte_model, make_config
from trainer import causal, cli, preparing
from trainer.checkpoints import last_checkpoint


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config file of a run that takes a second."""
    monkeypatch.setattr(preparing, "load_any", lambda *_, **__: byte_model())
    monkeypatch.chdir(tmp_path)
    document = make_config(tmp_path, epochs=1).model_dump(mode="json", exclude_defaults=True)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_run_ends_with_a_summary(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.train_command(config, ["rank=1"])
    adapter = read_adapter(tmp_path / "out" / "tiny.safetensors")
    out = capsys.readouterr().out
    assert adapter.spec.sites["block_output"].rank == 1
    assert adapter.spec.training.command == f"reft train {config} rank=1"
    assert adapter.digest in out
    assert "test_exact_match" in out


def test_an_error_is_one_message_and_a_code(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.train_command(config, ["rnak=1"])
    assert caught.value.code == cli.EXIT_ERROR
    captured = capsys.readouterr()
    assert "did you mean 'rank'?" in captured.err
    assert "Traceback" not in captured.err


def test_ctrl_c_leaves_nothing_behind(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(causal.CausalTask, "evaluate", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.train_command(config, [])
    assert caught.value.code == cli.EXIT_INTERRUPTED
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_module_says_how_it_is_called(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["trainer", *arguments])
    with pytest.raises(SystemExit, match="usage: python -m trainer CONFIG"):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["rank=2", "--layers", "every:3"], ["rank=2", "layers=every:3"]),
        (["--learning-rate=1e-3", "--max_length", "9"], ["learning_rate=1e-3", "max_length=9"]),
        (["--resume", "--no-tied", "a=1"], ["resume=true", "tied=false", "a=1"]),
        (["--resume", "false", "--tied"], ["resume=false", "tied=true"]),
        (["--template.user", "Q: {content}"], ["template.user=Q: {content}"]),
    ],
)
def test_flags_are_settings(arguments: list[str], settings: list[str]) -> None:
    assert cli.settings_of(arguments) == settings


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["rank"], "argument: got 'rank'"), (["--rank"], "--rank: got None, expected a value")],
)
def test_half_a_setting_is_refused(arguments: list[str], problem: str) -> None:
    with pytest.raises(TrainingError, match=problem):
        cli.settings_of(arguments)


def test_settings_and_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.list_settings()
    out = capsys.readouterr().out
    assert "learning_rate" in out
    assert "commonsense" in out


def test_ctrl_c_says_how_to_go_on(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(causal.CausalTask, "evaluate", interrupted)
    with pytest.raises(SystemExit):
        cli.train_command(config, ["--checkpoint-steps", "2"])
    err = capsys.readouterr().err
    assert "add --resume to go on from" in err
    assert "checkpoint-4" in err
    assert last_checkpoint(tmp_path / "out" / "checkpoints") is not None
    assert not list((tmp_path / "out").glob("*.safetensors"))
