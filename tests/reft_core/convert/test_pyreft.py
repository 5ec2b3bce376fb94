"""pyreft 0.1.0's own outputs, reproduced by its directories converted to our file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedTokenizerBase

from reft_core.adapter import Adapter, EditKey, decode_adapter
from reft_core.batch import AdapterUse
from reft_core.classification import HeadedEncoder
from reft_core.convert import ConvertOptions, base_from_folder, convert, to_pyreft
from reft_core.convert.assembling import Conventions, assemble
from reft_core.convert.pyreft.config import NAMED_SITES
from reft_core.edits import Edit
from reft_core.encoder import EncoderRequest
from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    InvalidRequest,
    ReftError,
    UnsupportedFeature,
)
from reft_core.loading import LoadedModel
from reft_core.sites import describe_model
from reft_core.spec import PositionSpec, TemplateSpec
from tests.factories import NoTokenizer, random_adapter
from tests.reference.slow import reference_classify, reference_logits
from tests.reft_core.convert.support import (
    Case,
    assert_reproduces,
    case_names,
    load_case,
    options,
    tiny_base,
)

CONVENTIONS = {
    "length": {"anchor": "prompt_end", "cap": "half"},
    "length-1": {"anchor": "before_last", "cap": "half"},
    "uncapped": {"anchor": "prompt_end", "cap": "shared"},
}
OUR_ACTIVATION = {None: "identity"}


def case_options(case: Case, **given: Any) -> ConvertOptions:
    """What pyreft does not record, from the case's description."""
    facts = case.facts
    known: dict[str, Any] = {"positions": facts["positions"], **CONVENTIONS[facts["last"]]}
    if facts["method"] not in ("consreft", "lobireft"):
        known["activation"] = OUR_ACTIVATION.get(facts["activation"], facts["activation"])
    return options(**(known | given))


def converted(case: Case, **given: Any) -> Adapter:
    return decode_adapter(convert(case.adapter_folder, "pyreft", case_options(case, **given)))


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
    dotted = _copy(case, tmp_path / "dotted")
    kept = _copy(case, tmp_path / "kept")
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
    folder = _copy(case, tmp_path / "a")
    name = "<class 'pyreft.interventions.LoreftIntervention_IdentityInit'>"
    _edit_config(folder, lambda c: c.update(intervention_types=[name] * 3))
    expected = convert(case.adapter_folder, "pyreft", case_options(case))
    assert convert(folder, "pyreft", case_options(case)) == expected


def test_reads_short_and_named_representations(tmp_path: Path) -> None:
    case = load_case("pyreft", "loreft-untied")
    folder = _copy(case, tmp_path / "a")
    expected = convert(folder, "pyreft", case_options(case))
    _edit_config(folder, lambda c: c.update(representations=[r[:5] for r in c["representations"]]))
    assert convert(folder, "pyreft", case_options(case)) == expected
    names = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension")
    _edit_config(
        folder,
        lambda c: c.update(
            representations=[dict(zip(names, r, strict=True)) for r in c["representations"]]
        ),
    )
    assert convert(folder, "pyreft", case_options(case)) == expected


def test_reads_weights_in_bfloat16(tmp_path: Path) -> None:
    """pyreft's default: learned source in bfloat16 beside a float32 rotation."""
    case = load_case("pyreft", "loreft-tied")
    folder = _copy(case, tmp_path / "a")
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


def test_an_empty_file_of_trained_parameters_is_ignored(tmp_path: Path) -> None:
    """pyreft's trainer writes pytorch_model.bin also when nothing else was trained."""
    case = load_case("pyreft", "loreft-tied")
    folder = _copy(case, tmp_path / "a")
    torch.save({}, folder / "pytorch_model.bin")
    assert convert(folder, "pyreft", case_options(case)) == convert(
        case.adapter_folder, "pyreft", case_options(case)
    )


def classifier(name: str, **given: Any) -> tuple[Case, Adapter]:
    case = load_case("pyreft", name)
    base = base_from_folder(str(case.folder / "base"), "tiny-encoder")
    return case, converted(case, **({"base": base, "labels": ("a", "b", "c")} | given))


@pytest.mark.parametrize(
    ("name", "pooling", "hidden"),
    [("roberta-classifier", "first", 24), ("bert-classifier", "pooler", None)],
)
def test_a_classifier_and_its_head_reproduce_pyreft(
    name: str, pooling: str, hidden: int | None
) -> None:
    """Text by text in the reference, and all in one batch in what serves."""
    case, adapter = classifier(name)
    assert adapter.spec.task.labels == ("a", "b", "c")
    assert adapter.spec.head is not None
    assert (adapter.spec.head.pooling, adapter.spec.head.hidden) == (pooling, hidden)
    model = AutoModel.from_pretrained(case.folder / "base").eval().requires_grad_(False)
    tokenizer: PreTrainedTokenizerBase = NoTokenizer()  # type: ignore[assignment]
    loaded = LoadedModel(model, tokenizer, describe_model(model, "tiny-encoder"))
    requests = [EncoderRequest(tuple(prompt), (AdapterUse(adapter),)) for prompt in case.prompts]
    served = HeadedEncoder(loaded).logits(requests)
    for prompt, logits, batched in zip(case.prompts, case.logits, served, strict=True):
        ours = reference_classify(model, prompt, [(adapter, 1.0)])
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batched, logits, atol=1e-5, rtol=1e-5)
        plain = reference_classify(model, prompt, [(adapter, 0.0)])
        assert (plain - logits).abs().max() > 0.1


@pytest.mark.parametrize("labels", [None, ("a", "b")])
def test_a_heads_labels_are_asked_for(labels: tuple[str, ...] | None) -> None:
    with pytest.raises(InvalidRequest, match="labels: got"):
        classifier("roberta-classifier", labels=labels)


def test_labels_without_a_head_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="labels: got"):
        converted(load_case("pyreft", "loreft-tied"), labels=("a", "b"))


def test_other_trained_parameters_are_refused_by_name(tmp_path: Path) -> None:
    case = load_case("pyreft", "loreft-tied")
    folder = _copy(case, tmp_path / "a")
    torch.save({"embeddings.weight": torch.zeros(2, 2)}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedFeature, match=r"pytorch_model\.bin.*embeddings\.weight"):
        convert(folder, "pyreft", case_options(case))


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


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", ["positions", "anchor", "cap", "activation", "template", "name"]
)
def test_what_pyreft_does_not_record_is_asked_for(missing: str) -> None:
    case = load_case("pyreft", "loreft-tied")
    with pytest.raises(InvalidRequest, match=f"^{missing}: got None, expected ") as caught:
        convert(case.adapter_folder, "pyreft", case_options(case, **{missing: None}))
    assert caught.value.field == missing


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("loreft-tied", {"positions": "x3"}, "positions: got 'x3', expected 'fN'"),
        ("loreft-tied", {"positions": "l2", "tied": False}, "tied: got False, expected True"),
        ("loreft-untied", {"positions": "l2"}, "positions: got 'l2', expected a two-sided rule"),
        ("loreft-untied", {"tied": True}, "tied: got True, expected False"),
        ("loreft-tied", {"method": "noreft"}, "method: got 'noreft', expected 'loreft'"),
        ("loreft-tied", {"activation": "selu"}, "activation: got 'selu', expected one of identity"),
        ("loreft-tied", {"anchor": "end"}, "anchor: "),
        ("loreft-tied", {"cap": "none"}, "cap: "),
        ("loreft-tied", {"name": "a b"}, "name: got 'a b'"),
        ("loreft-tied", {"template": "Q"}, "template: got 'Q'"),
        ("loreft-tied", {"layers": (1,)}, "layers: got .* expected nothing"),
        ("loreft-tied", {"phase": "all"}, "phase: got 'all', expected 'prompt'"),
        ("consreft", {"activation": "relu"}, "activation: got 'relu', expected 'identity'"),
    ],
)
def test_wrong_options_are_named(name: str, given: dict[str, Any], message: str) -> None:
    case = load_case("pyreft", name)
    with pytest.raises(InvalidRequest, match=message):
        convert(case.adapter_folder, "pyreft", case_options(case, **given))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="kind: got 'x', expected one of pyreft"):
        convert(Path("."), "x", options())


@pytest.mark.parametrize(
    "change", [{"hidden_size": 32}, {"num_layers": 2}], ids=["hidden", "layers"]
)
def test_another_base_model_is_refused(change: dict[str, int]) -> None:
    case = load_case("pyreft", "direft-orthonormal")
    base = replace(options().base, **change)
    with pytest.raises((AdapterMismatch, AdapterFileInvalid), match=r"layer|embed_dim|shape"):
        convert(case.adapter_folder, "pyreft", case_options(case, base=base))


# -- bad directories -----------------------------------------------------------------------------


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
    folder = _copy(case, tmp_path / "a")
    _edit_config(folder, change)
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
    folder = _copy(case, tmp_path / "a")
    path = folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"
    damage(path)
    with pytest.raises(AdapterFileInvalid, match=message) as caught:
        convert(folder, "pyreft", case_options(case))
    assert "intkey_layer_0" in str(caught.value) or path.name in str(caught.value)
    assert "expected" in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_unit_without_an_entry_is_refused(tmp_path: Path) -> None:
    case = load_case("pyreft", "loreft-tied")
    folder = _copy(case, tmp_path / "a")
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


# -- back to pyreft ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", case_names("pyreft"))
def test_goes_back_to_pyreft_and_returns(name: str, tmp_path: Path) -> None:
    """Our export, read again by our own importer, still reproduces pyreft's outputs."""
    case = load_case("pyreft", name)
    adapter = converted(case)
    (form,) = adapter.spec.sites.values()
    if "shift" in form.parts and len(form.parts) > 1:
        with pytest.raises(UnsupportedFeature, match="shift"):
            to_pyreft(adapter, tmp_path / "adapter")
        return
    class_name = to_pyreft(adapter, tmp_path / "adapter")
    known = case_options(case)
    lobireft = class_name == "LobireftIntervention"
    again = options(
        positions=known.positions,
        anchor=known.anchor,
        cap=known.cap,
        activation=None if lobireft else form.activation,
    )
    assert_reproduces(decode_adapter(convert(tmp_path / "adapter", "pyreft", again)), case)


def _rotation(rank: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(24, rank))[0]


def _forms() -> dict[str, Edit]:
    r, free = _rotation(2), torch.randn(2, 24)
    w, b = torch.randn(24, 2), torch.randn(2)
    return {
        "loreft": Edit(down=w, skip=r, up=r.mT, bias=b),
        "loreft-relu": Edit(down=w, skip=r, up=r.mT, bias=b, activation="relu"),
        "consreft": Edit(down=-r, up=r.mT, bias=b),
        "no-bias": Edit(down=w, up=r.mT),
        "direft-tanh": Edit(down=w, up=r.mT, bias=b, activation="tanh"),
        "direft": Edit(down=w, up=free, bias=b),
        "scaled": Edit(down=w, up=r.mT, bias=b, scale=2.0),
        "noreft": Edit(down=w, skip=free.mT, up=free, bias=b),
        "noreft-silu": Edit(down=w, skip=free.mT, up=free, bias=b, activation="silu"),
        "vector": Edit(shift=torch.randn(24)),
        "zero": Edit(shift=torch.zeros(24)),
        "red": Edit(shift=torch.randn(24), gain=torch.randn(24)),
        "other-skip": Edit(down=w, skip=w, up=free, bias=b, activation="silu"),
        "mixed": Edit(down=w, up=free, bias=b, shift=torch.randn(24)),
    }


def _adapter(edit: Edit, method: str) -> Adapter:
    """An adapter with this edit in layers 0 and 2."""
    conventions = Conventions(
        method=method,
        positions=PositionSpec(rule="f2+l2"),
        template=None,
        name="form",
        tool="test",
        file="a.bin",
    )
    edits = {EditKey(layer, "block_output", 0): edit for layer in (0, 2)}
    return decode_adapter(assemble(edits, conventions, options()).to_bytes())


@pytest.mark.parametrize(
    ("form", "class_name"),
    [
        ("loreft", "LoreftIntervention"),
        ("loreft-relu", "LoreftIntervention"),
        ("consreft", "LoreftIntervention"),
        ("no-bias", "LoreftIntervention"),
        ("direft-tanh", "DireftIntervention"),
        ("direft", "NodireftIntervention"),
        ("scaled", "NodireftIntervention"),
        ("noreft", "NodireftIntervention"),
        ("noreft-silu", "NoreftIntervention"),
        ("vector", "LobireftIntervention"),
        ("zero", "LobireftIntervention"),
        ("red", None),
        ("other-skip", None),
        ("mixed", None),
    ],
)
def test_each_form_becomes_the_class_that_fits(
    form: str, class_name: str | None, tmp_path: Path
) -> None:
    edit = _forms()[form]
    adapter = _adapter(edit, form)
    folder = tmp_path / "out"
    if class_name is None:
        with pytest.raises(UnsupportedFeature, match="six classes"):
            to_pyreft(adapter, folder)
        assert not folder.exists()
        return
    assert to_pyreft(adapter, folder) == class_name
    vector = class_name == "LobireftIntervention"
    again = options(
        positions="f2+l2",
        anchor="prompt_end",
        cap="shared",
        activation=None if vector else edit.activation,
    )
    h = torch.randn(5, 24)
    for key, returned in decode_adapter(convert(folder, "pyreft", again)).edits.items():
        torch.testing.assert_close(returned.delta(h), edit.delta(h), atol=2e-5, rtol=1e-5)
        assert key.layer in (0, 2)


@pytest.mark.parametrize(
    ("site", "phase", "source", "message"),
    [
        ("block_output", "all", "output", r"sites\.block_output: got \('all', 'output'\)"),
        ("mlp_output", "prompt", "input", r"sites\.mlp_output: got \('prompt', 'input'\)"),
        ("heads", "prompt", "output", "sites: got 'heads', expected some of block_output"),
    ],
)
def test_other_sites_phases_and_sources_are_refused(
    site: str, phase: Any, source: Any, message: str, tmp_path: Path
) -> None:
    edit = replace(_forms()["direft"], source=source)
    conventions = Conventions("x", PositionSpec(rule="l1"), None, "x", "test", "a.bin", phase)
    made = assemble({EditKey(0, site, 0): edit}, conventions, options())
    with pytest.raises(UnsupportedFeature, match=message):
        to_pyreft(decode_adapter(made.to_bytes()), tmp_path / "out")


def test_an_interchange_is_refused(tmp_path: Path) -> None:
    """Without its source it would empty the subspace: ConsReFT with s = 0, another function."""
    adapter = random_adapter(options().base, method="interchange", layers=[0, 2], positions="l1")
    with pytest.raises(UnsupportedFeature, match=r"sites\.block_output\.interchange: got True"):
        to_pyreft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_strength_is_multiplied_in(tmp_path: Path) -> None:
    case = load_case("pyreft", "loreft-tied")
    adapter = converted(case, strength=0.5)
    assert to_pyreft(adapter, tmp_path / "out") == "NodireftIntervention"
    again = decode_adapter(convert(tmp_path / "out", "pyreft", case_options(case)))
    prompt = case.prompts[-1]
    expected = reference_logits(tiny_base(), prompt, len(prompt), adapter, 0.5)
    torch.testing.assert_close(
        reference_logits(tiny_base(), prompt, len(prompt), again), expected, atol=1e-5, rtol=0
    )


def _copy(case: Case, folder: Path) -> Path:
    shutil.copytree(case.adapter_folder, folder)
    return folder


def _rename(folder: Path, old: str, new: str) -> None:
    (folder / f"intkey_{old}.bin").rename(folder / f"intkey_{new}.bin")


def _edit_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
