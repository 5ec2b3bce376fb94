from __future__ import annotations

from pathlib import Path

import pytest

from reft_core.errors import TrainingError
from tests.factories import tiny_description, tiny_loaded
from trainer.config import TrainConfig
from trainer.config.file import load_config

MINIMAL = "name: x\ntrain: train.jsonl\nvalid: sub/valid.jsonl\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_paths_count_from_the_file_and_defaults_from_the_current_folder(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.train == tmp_path / "train.jsonl"
    assert config.valid == tmp_path / "sub/valid.jsonl"
    assert config.test is None
    assert config.output == Path("runs/x/x.safetensors")
    assert config.report_dir == Path("runs/x")
    assert (config.model, config.rank, config.layers, str(config.rule)) == ("demo", 4, "all", "l1")


def test_a_model_folder_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert load_config(write(tmp_path, MINIMAL + "model: base\n")).model == str(tmp_path / "base")
    assert load_config(write(tmp_path, MINIMAL + "model: org/base\n")).model == "org/base"


def test_subspaces_name_ranks(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "rank: 6\nsubspaces: {tone: '0:2', topic: [2, 5]}\n")
    config = load_config(path)
    assert config.subspaces == {"tone": (0, 1), "topic": (2, 5)}
    assert config.placement(tiny_description()) is not None
    assert load_config(path, ["subspaces.tone='4:5'"]).subspaces == {"tone": (4,), "topic": (2, 5)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("subspaces: {a: 4:8}", "quote the range: '4:8'"),
        ("subspaces: {a: x}", r"subspaces: got 'x', expected ranges of ranks such as 0:4"),
        ("subspaces: {}", "at least 1"),
        ("subspaces: {a: '0'}\nmethod: prompt_tuning", "subspaces means nothing to prompt_tuning"),
    ],
)
def test_subspaces_of_another_form_are_refused(settings: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        load_config(write(tmp_path, MINIMAL + settings + "\n"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("subspaces: {a: '2:5'}", r"subspaces\.a: got \[2, 3, 4\], expected ranks 0 to 3"),
        ("subspaces: {a: '0', b: [0]}", "expected each rank at most once"),
        ("subspaces: {a: '0'}\nmethod: lobireft", "none: a site has no ranks"),
    ],
)
def test_subspaces_are_held_to_the_methods_ranks(
    settings: str, message: str, tmp_path: Path
) -> None:
    """Before training, which would be lost otherwise."""
    config = load_config(write(tmp_path, MINIMAL + settings + "\n"))
    with pytest.raises(TrainingError, match=message) as caught:
        config.placement(tiny_description())
    assert caught.value.field == "subspaces"


def test_overrides_win_and_reach_into_mappings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(tmp_path, MINIMAL + "rank: 4\ntemplate: {user: 'Q: {content}'}\n")
    overrides = [
        "rank=8",
        "learning_rate=1e-3",
        "layers=[1,2]",
        "positions=f3+l1",
        "test=t.jsonl",
        "template.generation='A:'",
        "output=o/a.safetensors",
    ]
    config = load_config(path, overrides)
    assert config.rank == 8
    assert config.learning_rate == 1e-3
    assert config.layers == (1, 2)
    assert str(config.rule) == "f3+l1"
    assert config.test == here / "t.jsonl"
    assert config.output == here / "o/a.safetensors"
    assert config.report_dir == here / "o"
    assert config.template is not None
    assert (config.template.user, config.template.generation) == ("Q: {content}", "A:")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("learning_rat: 1", ["learning_rat", "did you mean 'learning_rate'"]),
        ("template: {usr: x}", ["template.usr", "did you mean 'user'"]),
        ("zzzz: 1", ["zzzz", "known are", "batch_size"]),
        ("rank: 0", ["rank", "got 0"]),
        ("positions: q7", ["positions", "q7", "fN+lM"]),
        ("positions: [0, 0]", ["positions", "0,0"]),
        ("method: lorft", ["method", "lorft", "loreft"]),
        ("layers: every:0", ["layers"]),
        ("layers: []", ["layers", "at least one"]),
        ("layers: [2, 1]", ["ascending"]),
        ("metrics: [bluer]", ["bluer", "did you mean 'bleu'"]),
        ("labels: [a, ' a']", ["labels", "distinct"]),
        ("learning_rate: .nan", ["learning_rate"]),
        ("name: 'a/b'", ["name", "a/b"]),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    text = MINIMAL if not line.startswith("name") else MINIMAL.replace("name: x\n", "")
    with pytest.raises(TrainingError) as caught:
        load_config(write(tmp_path, f"{text}{line}\n"))
    for part in parts:
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rank: 1\n", "no data: give data"),
        ("data: a.jsonl\ntrain: b.jsonl\n", "data and train both name"),
    ],
)
def test_rows_must_come_from_somewhere(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(TrainingError, match=rf"config\.yaml: {problem}"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("override", ["rank", "=3", "rank=[", "name.inner=1"])
def test_a_bad_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(TrainingError, match="override"):
        load_config(write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize("text", ["- a list\n", "a: [\n", "", "[" * 10_000])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(TrainingError, match=r"config\.yaml"):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6)),
        ("every:3", (0, 3, 6)),
        ("every:2", (0, 2, 4, 6)),
        ("every:9", (6,)),
        ([1, 5], (1, 5)),
    ],
)
def test_layers_of_a_model_of_seven(layers: object, expected: tuple[int, ...]) -> None:
    config = TrainConfig(name="x", train="t", valid="v", layers=layers)  # type: ignore[arg-type]
    assert config.layer_indices(7) == expected


def test_a_layer_the_model_lacks_is_refused() -> None:
    config = TrainConfig(name="x", train="t", valid="v", layers=(1, 7))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="layers: got 7, expected at most 6"):
        config.layer_indices(7)


def test_a_list_of_positions_becomes_a_rule() -> None:
    config = TrainConfig(name="x", train="t", valid="v", positions=[0, -1])  # type: ignore[arg-type]
    assert config.position_spec.rule == "0,-1"
    assert config.rule.resolve(5) == ((0, 4),)


def test_configs_survive_json(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "layers: [1]\nlabels: [a, b]\ntemplate: {}\n"))
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, None),
        ({"scale": 2.5}, 2.5),
        ({"alpha": 16, "rank": 4}, 4.0),
        ({"alpha": 16, "rank": 4, "scaling": "sqrt_rank"}, 8.0),
    ],
)
def test_the_scale_of_lora(settings: dict, scale: float | None) -> None:
    config = TrainConfig(
        name="a",
        train="t",
        valid="v",
        method="lora",
        sites=("linear:self_attn.q_proj",),
        **settings,
    )
    assert config.fixed_scale == scale
    built = config.placement(tiny_description()).build(1)
    assert {module.scale for module in built.values()} == {scale or 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1, "alpha": 1}, "give one of them"),
        ({"scaling": "sqrt_rank"}, "there is no alpha"),
        ({"alpha": 0}, "greater than 0"),
    ],
)
def test_scales_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(name="a", train="t", valid="v", method="lora", **settings)


def test_a_method_without_a_scale_refuses_one() -> None:
    config = TrainConfig(name="a", train="t", valid="v", alpha=16)
    with pytest.raises(TrainingError, match=r"scale: got 4.0.*methods with one are .*lora"):
        config.placement(tiny_description())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_length": 8}, "prefix_length needs a method with virtual tokens"),
        ({"method": "prompt_tuning", "prefix_bottleneck": 8}, "prompt_tuning has not"),
        ({"method": "prefix_tuning", "rank": 8}, "rank means nothing to prefix_tuning"),
        ({"method": "mam"}, "positions must be 'prompt'"),
        ({"method": "prefix_tuning", "prefix_length": 0}, "greater than or equal to 1"),
    ],
)
def test_virtual_tokens_where_they_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(name="a", train="t", valid="v", **settings)


def test_virtual_tokens_are_refused_where_attention_slides() -> None:
    config = TrainConfig(name="a", train="t", valid="v", method="prefix_tuning")
    with pytest.raises(TrainingError, match="attention slides"):
        config.virtual_tokens(tiny_loaded("mistral"))
