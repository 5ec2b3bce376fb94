"""What pyreft does not record is asked for, and what it does must agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reft_core.convert import convert
from reft_core.errors import AdapterFileInvalid, AdapterMismatch, InvalidRequest
from tests.reft_core.convert.pyreft.cases import case_options
from tests.reft_core.convert.support import load_case, options


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
