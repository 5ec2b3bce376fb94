"""pyreft 0.1.0's own outputs, reproduced by its directories converted to our file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reft_core.adapter import decode_adapter
from reft_core.batch import AdapterUse
from reft_core.convert import convert
from reft_core.convert.pyreft.config import NAMED_SITES
from reft_core.errors import InvalidRequest
from reft_core.spec import TemplateSpec
from tests.reft_core.convert.pyreft.cases import case_options, converted, edit_config
from tests.reft_core.convert.support import assert_reproduces, case_names, copied, load_case


def _rename(folder: Path, old: str, new: str) -> None:
    (folder / f"intkey_{old}.bin").rename(folder / f"intkey_{new}.bin")


@pytest.mark.parametrize("name", case_names("pyreft"))
def test_reproduces_pyreft(name: str) -> None:
    case = load_case("pyreft", name)
    adapter = converted(case)
    assert_reproduces(adapter, case)
    assert adapter.spec.method == case.facts["method"]
    assert adapter.spec.positions.tied == (case.facts["tied"] or "+" not in case.facts["positions"])
    site = NAMED_SITES.get(case.facts["component"], "block_output")
    assert {name: list(form.layers) for name, form in adapter.spec.sites.items()} == {
        site: case.facts["layers"]
    }


def test_the_cases_cover_every_class() -> None:
    methods = {load_case("pyreft", name).facts["method"] for name in case_names("pyreft")}
    assert methods == {
        "loreft",
        "direft_orthonormal",
        "noreft",
        "direft",
        "consreft",
        "lobireft",
    }


@pytest.mark.parametrize("style", ["comp", "repr"])
@pytest.mark.parametrize("name", ["loreft-untied", "loreft-path", "consreft"])
def test_reads_the_key_styles_of_older_versions(name: str, style: str, tmp_path: Path) -> None:
    """Dots throughout, and a component's own dots kept between underscores."""
    case = load_case("pyreft", name)
    dotted = copied(case, tmp_path / "dotted")
    kept = copied(case, tmp_path / "kept")
    config = json.loads((dotted / "config.json").read_text())
    for row, key in zip(config["representations"], config["sorted_keys"], strict=True):
        layer, component, number = row[0], row[1], key.rpartition("#")[2]
        place = "" if "." in component else f"layer.{layer}."
        _rename(dotted, key, f"{place}{style}.{component}.unit.pos.nunit.1#{number}")
        place = place.replace(".", "_")
        _rename(kept, key, f"{place}comp_{component}_unit_pos_nunit_1#{number}")
    expected = convert(case.adapter_folder, "pyreft", case_options(case))
    assert convert(dotted, "pyreft", case_options(case)) == expected
    assert convert(kept, "pyreft", case_options(case)) == expected


def test_loreft_that_began_as_the_identity_is_loreft(tmp_path: Path) -> None:
    """pyreft's later class differs in how W and b are drawn; at rest it is the same."""
    case = load_case("pyreft", "loreft-tied")
    folder = copied(case, tmp_path / "a")
    name = "<class 'pyreft.interventions.LoreftIntervention_IdentityInit'>"
    edit_config(folder, lambda c: c.update(intervention_types=[name] * 3))
    expected = convert(case.adapter_folder, "pyreft", case_options(case))
    assert convert(folder, "pyreft", case_options(case)) == expected


def test_reads_short_and_named_representations(tmp_path: Path) -> None:
    case = load_case("pyreft", "loreft-untied")
    folder = copied(case, tmp_path / "a")
    expected = convert(folder, "pyreft", case_options(case))
    edit_config(folder, lambda c: c.update(representations=[r[:5] for r in c["representations"]]))
    assert convert(folder, "pyreft", case_options(case)) == expected
    names = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension")
    edit_config(
        folder,
        lambda c: c.update(
            representations=[dict(zip(names, r, strict=True)) for r in c["representations"]]
        ),
    )
    assert convert(folder, "pyreft", case_options(case)) == expected


def test_reads_weights_in_bfloat16(tmp_path: Path) -> None:
    """pyreft's default: learned source in bfloat16 beside a float32 rotation."""
    case = load_case("pyreft", "loreft-tied")
    folder = copied(case, tmp_path / "a")
    for path in folder.glob("*.bin"):
        state = torch.load(path, weights_only=True)
        state |= {key: state[key].bfloat16() for key in ("weight", "bias")}
        torch.save(state, path)
    adapter = decode_adapter(convert(folder, "pyreft", case_options(case)))
    exact = converted(case)
    for key, edit in exact.edits.items():
        assert edit.down is not None
        torch.testing.assert_close(adapter.edits[key].down, edit.down, atol=2e-2, rtol=0)
        torch.testing.assert_close(adapter.edits[key].up, edit.up, atol=0, rtol=0)


def test_template_and_provenance_are_kept() -> None:
    case = load_case("pyreft", "loreft-tied")
    template = TemplateSpec(user="Q: {content}\nA:")
    adapter = converted(case, template=template, description="d", strength=0.5)
    assert adapter.spec.template == template
    assert adapter.spec.training.tool == "converted from pyreft"
    assert (adapter.spec.description, adapter.spec.strength) == ("d", 0.5)


def test_ranks_get_names_that_a_request_may_weigh() -> None:
    """Of rank 4: half of the subspace alone, Σ over its ranks of (hW + b − hR)ᵢ Rᵢᵀ."""
    case = load_case("pyreft", "loreft-tied")
    plain = converted(case)
    named = converted(case, subspaces={"tone": (0, 3), "topic": (1, 2)})
    assert named.spec.subspaces == {"tone": (0, 3), "topic": (1, 2)}
    h = torch.randn(5, 24)
    use = AdapterUse(named, subspaces=(("tone", 0.5),))
    for key, edit in plain.edits.items():
        assert edit.down is not None
        assert edit.up is not None
        inner = h @ edit.down + edit.bias
        expected = 0.5 * inner[:, [0, 3]] @ edit.up[[0, 3]]
        torch.testing.assert_close(use.edits[key].delta(h), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "subspaces", "message"),
    [
        ("loreft-tied", {"a": (4,)}, r"^subspaces\.a: got \[4\], expected ranks 0 to 3"),
        ("loreft-tied", {"a": (0,), "b": (0,)}, "^subspaces: got ranks .*at most once"),
        ("lobireft", {"a": (0,)}, r"^subspaces\.a: got \[0\], expected none: a site has no ranks"),
    ],
)
def test_names_for_ranks_that_are_not_there_are_refused(
    name: str, subspaces: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        converted(load_case("pyreft", name), subspaces=subspaces)
