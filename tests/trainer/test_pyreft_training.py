"""Steps against pyreft's own: same start, rows, order and optimiser, same losses.

The fixtures are of tests/fixtures/make_pyreft_training.py. pyreft keeps R orthonormal by torch's
parametrisation, under which the same optimiser takes another path than under Cholesky-QR: so
methods with R have torch's here too (:func:`rotate_by_torch`), and the others are as they are.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_core.methods.placement import Placement
from reft_core.methods.rotated import Rotated, rotate_by_torch
from reft_core.positions import PositionRule
from reft_core.sites import describe_model
from tests.fixtures.tiny import base_model
from trainer.collate import Collator
from trainer.data import TokenisedExample
from trainer.prefix import PrefixStore
from trainer.reft_model import ReftModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(folder.name for folder in (FIXTURES / "pyreft_training").iterdir())
TOLERANCE = 1e-4
ROTATION = "rotate_layer.parametrizations.weight"
NAMES = {
    "learned_source.weight": "weight",
    "learned_source.bias": "bias",
    f"{ROTATION}.original": "parametrizations.basis.original",
    f"{ROTATION}.0.base": "parametrizations.basis.0.base",
}
"""Ours for pyreft's; of proj_layer it depends on the method."""
PROJECTIONS = {"direft": "up", "noreft": "projection"}


def load_start(model: ReftModel, folder: Path, method: str) -> None:
    """Give the interventions the parameters that pyreft started with."""
    names = NAMES | {"proj_layer.weight": PROJECTIONS.get(method, "")}
    start = load_file(folder / "start.safetensors")
    for key, intervention in zip(model.keys, model.interventions, strict=True):
        if isinstance(intervention, Rotated):
            rotate_by_torch(intervention)
        of_this = f"{key.layer}.{key.unit}."
        own = {n.removeprefix(of_this): t for n, t in start.items() if n.startswith(of_this)}
        intervention.load_state_dict({names[name]: tensor for name, tensor in own.items()})


@pytest.mark.parametrize("case", CASES)
def test_the_first_losses_are_pyrefts(case: str) -> None:
    folder = FIXTURES / "pyreft_training" / case
    facts = json.loads((folder / "case.json").read_text())
    base = base_model(FIXTURES)
    rule = PositionRule.parse(facts["positions"], tied=facts["tied"])
    placement = Placement.on(
        describe_model(base, "tiny"),
        facts["method"],
        layers=tuple(facts["layers"]),
        rank=facts["rank"],
    )
    store = PrefixStore(base, 2**20)
    model = ReftModel(base, placement, num_units=rule.num_units, prefixes=store)
    load_start(model, folder, facts["method"])
    optimiser = torch.optim.AdamW(model.trainable(), lr=facts["learning_rate"], weight_decay=0.0)
    rows = [TokenisedExample(tuple(r["prompt"]), tuple(r["completion"])) for r in facts["rows"]]
    losses = []
    for step in range(len(facts["losses"])):
        first = step * facts["batch_size"] % len(rows)
        batch = Collator(rule)(rows[first : first + facts["batch_size"]])
        loss = model(**batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trainable(), facts["max_grad_norm"])
        optimiser.step()
        losses.append(loss.item())
    assert len(losses) == 20
    assert facts["losses"][-1] < 0.9 * facts["losses"][0], "or there is nothing to follow"
    worst = max(abs(a - b) for a, b in zip(losses, facts["losses"], strict=True))
    assert worst < TOLERANCE, f"largest difference {worst}"
