"""Adapters written as pyreft directories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_core.adapter import Adapter, EditKey, decode_adapter
from reft_core.convert import convert, to_pyreft
from reft_core.convert.assembling import Conventions, assemble
from reft_core.edits import Edit
from reft_core.errors import UnsupportedFeature
from reft_core.spec import PositionSpec
from tests.factories import random_adapter
from tests.reference.slow import reference_logits
from tests.reft_core.convert.pyreft.cases import case_options, converted
from tests.reft_core.convert.support import (
    assert_reproduces,
    case_names,
    load_case,
    options,
    tiny_base,
)


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
