"""Edits put together to one of our adapters."""

from __future__ import annotations

import pytest
import torch

from reft_core.adapter import EditKey
from reft_core.convert.assembling import Conventions, assemble
from reft_core.edits import Edit
from reft_core.errors import AdapterFileInvalid, AdapterMismatch, InvalidRequest
from reft_core.spec import PositionSpec
from tests.reft_core.convert.support import options


def _conventions(rule: str = "l1", tied: bool = True, name: str = "a") -> Conventions:
    return Conventions("direft", PositionSpec(rule=rule, tied=tied), None, name, "test", "a.bin")


def _edit(rank: int, bias: bool = True) -> Edit:
    return Edit(
        down=torch.randn(24, rank),
        up=torch.randn(rank, 24),
        bias=torch.randn(rank) if bias else None,
        activation="sigmoid",
    )


def test_ranks_are_padded_without_changing_the_edit() -> None:
    """sigmoid(0) is not 0, yet a padded column contributes nothing."""
    edits = {EditKey(layer, "block_output", 0): _edit(rank) for layer, rank in ((0, 1), (2, 3))}
    result = assemble(edits, _conventions(), options())
    assert result.spec.sites["block_output"].rank == 3
    h = torch.randn(4, 24)
    for key, edit in edits.items():
        torch.testing.assert_close(result.edits[key].delta(h), edit.delta(h))


def test_missing_units_and_mixed_forms_are_refused() -> None:
    one = {EditKey(0, "block_output", 0): _edit(2)}
    with pytest.raises(AdapterFileInvalid, match=r"a\.bin: layer 0: got 'units without 1'"):
        assemble(one, _conventions("f1+l1", tied=False), options())
    two = one | {EditKey(1, "block_output", 0): _edit(2, bias=False)}
    with pytest.raises(AdapterFileInvalid, match=r"a\.bin: edits: .*one form for all"):
        assemble(two, _conventions(), options())


def test_a_name_our_files_refuse_is_an_option_error() -> None:
    with pytest.raises(InvalidRequest, match=r"name: got '\.\./x'"):
        assemble({EditKey(0, "block_output", 0): _edit(2)}, _conventions(name="../x"), options())


def test_a_site_the_base_lacks_is_refused() -> None:
    edits = {EditKey(0, "linear:mlp.c_fc", 0): Edit(shift=torch.ones(24))}
    with pytest.raises(AdapterMismatch, match=r"a\.bin: site: got 'linear:mlp\.c_fc', expected"):
        assemble(edits, _conventions(), options())
