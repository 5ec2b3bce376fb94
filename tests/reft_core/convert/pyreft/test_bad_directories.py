"""Damaged and hostile pyreft directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_core.convert import convert
from reft_core.errors import AdapterFileInvalid, ReftError
from tests.reft_core.convert.pyreft.cases import case_options, converted, edit_config
from tests.reft_core.convert.support import copied, load_case, options


def _config(**fields: Any) -> Any:
    return lambda config: config.update(fields)


def _row(index: int, value: Any) -> Any:
    def change(config: dict[str, Any]) -> None:
        config["representations"][0][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_config(mode="serial"), "mode: got 'serial'"),
        (_config(representations=[]), "intervention_types"),
        (_config(representations="x"), "representations: got 'x'"),
        (_config(intervention_types=["<class 'os.system'>"] * 3), r"os\.system.*LoreftInt"),
        (_config(intervention_types=[1] * 3), r"intervention_types\[0\]: got 1"),
        (_row(0, 7), "exactly one file of|layer: got 7"),
        (_row(0, True), r"representations\[0\]\.layer: got True"),
        (_row(1, "../../etc/passwd"), "component"),
        (_row(1, "query_output"), "component: got 'query_output', expected one that acts at"),
        (_row(1, "mlp_output"), "exactly one file of .*comp_mlp_output"),
        (_row(1, "model.layers[0].self_attn.q_proj.output"), "component: got .*expected one that"),
        (_row(1, "base_model.model.model.layers[0].output"), "PEFT"),
        (_row(2, "h.pos"), "unit: got 'h.pos'"),
        (_row(4, 3), "got 'rank 4', expected 'rank 3|rank 4.*rank 3"),
        (_row(4, "4"), "low_rank_dimension"),
        (_row(7, [[0, 2], [2, 4]]), "subspace_partition"),
        (_row(9, 0), "intervention_link_key"),
    ],
)
def test_bad_configs_name_their_key(change: Any, message: str, tmp_path: Path) -> None:
    case = load_case("pyreft", "loreft-tied")
    folder = copied(case, tmp_path / "a")
    edit_config(folder, change)
    with pytest.raises(ReftError, match=message) as caught:
        convert(folder, "pyreft", case_options(case))
    assert "config.json" in str(caught.value) or ".bin" in str(caught.value)


def _state(**tensors: Any) -> Any:
    """Change entries of the first unit's state dict; None deletes."""

    def change(path: Path) -> None:
        state = {**torch.load(path, weights_only=True), **tensors}
        torch.save({key: value for key, value in state.items() if value is not None}, path)

    return change


class Forbidden:
    """What a hostile pickle would build."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


HOSTILE = [
    pytest.param(lambda p: p.write_text("not a pickle"), "weights_only", id="text"),
    pytest.param(lambda p: p.write_bytes(b""), "weights_only", id="empty"),
    pytest.param(lambda p: p.write_bytes(p.read_bytes()[:700]), "weights_only", id="truncated"),
    pytest.param(lambda p: torch.save({"weight": Forbidden()}, p), "Unpickling", id="global"),
    pytest.param(lambda p: torch.save([1, 2], p), "a dict from names", id="list"),
    pytest.param(lambda p: torch.save({1: torch.ones(1)}, p), "a dict from names", id="keys"),
    pytest.param(lambda p: p.unlink(), "exactly one file", id="missing"),
    pytest.param(_state(weight=None), "weight: got", id="no-weight"),
    pytest.param(_state(bias=None), "bias: got 'no such key", id="no-bias"),
    pytest.param(_state(extra=torch.ones(1)), r"keys: got \['extra'\]", id="extra"),
    pytest.param(_state(weight=torch.ones(4, 23)), r"weight: got 'shape \(4, 23\)'", id="shape"),
    pytest.param(_state(weight=torch.ones(99, 24)), "rank 99", id="rank"),
    pytest.param(_state(weight="x"), "weight: got", id="string"),
    pytest.param(_state(weight=torch.ones(4, 24).long()), "int64", id="integers"),
    pytest.param(_state(weight=torch.full((4, 24), torch.nan)), "NaN", id="nan"),
    pytest.param(_state(weight=torch.ones(1).expand(2**20, 2**20)), "weight: got", id="huge-view"),
    pytest.param(_state(weight=torch.eye(4, 24).to_sparse()), "weight: got", id="sparse"),
]


@pytest.mark.parametrize(("damage", "message"), HOSTILE)
def test_bad_units_name_file_key_and_expectation(
    damage: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = load_case("pyreft", "loreft-tied")
    folder = copied(case, tmp_path / "a")
    path = folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"
    damage(path)
    with pytest.raises(AdapterFileInvalid, match=message) as caught:
        convert(folder, "pyreft", case_options(case))
    assert "intkey_layer_0" in str(caught.value) or path.name in str(caught.value)
    assert "expected" in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_unit_without_an_entry_is_refused(tmp_path: Path) -> None:
    case = load_case("pyreft", "loreft-tied")
    folder = copied(case, tmp_path / "a")
    unit = folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"
    shutil.copy(unit, folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#1.bin")
    with pytest.raises(AdapterFileInvalid, match="one for every intkey_ file"):
        convert(folder, "pyreft", case_options(case))


def test_a_rotation_broken_by_weight_decay_is_reported() -> None:
    """torch truncates the parametrisation's ±1 diagonal, so 0.99 becomes 0."""
    facts = converted(load_case("pyreft", "consreft-decayed")).spec.training.hyperparameters
    assert facts["rotation_error"] == pytest.approx(1.0)
    facts = converted(load_case("pyreft", "consreft")).spec.training.hyperparameters
    assert facts["rotation_error"] < 1e-5


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileInvalid, match="expected the folder"):
        convert(tmp_path / "none", "pyreft", options())
    with pytest.raises(AdapterFileInvalid, match=r"exactly one of the files config\.json"):
        convert(tmp_path, "pyreft", options())
