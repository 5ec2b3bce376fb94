"""The classifier's forward against one text at a time: same loss, same gradients, less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reft_core.edits import activate
from reft_core.methods import METHODS
from reft_core.methods.placement import Placement
from reft_core.positions import PositionRule
from reft_core.sites import find_layers
from reft_core.spec import HeadSpec
from tests.factories import HIDDEN_SIZE, assert_close
from tests.reft_core.test_classification import ENCODERS, encoder, loaded
from tests.trainer.naive import edited_row_by_row, gradients, move
from trainer.classify.head import TrainableHead
from trainer.classify.model import ClassifierModel
from trainer.classify.rows import TextCollator, TextRow

ROWS = [
    TextRow((5, 6, 7, 8, 9, 10, 11), (0, 0, 0, 1, 1, 1, 1), 0.0),
    TextRow((12, 13), (0, 0), 1.0),
    TextRow((14, 15, 16, 17), (0, 0, 1, 1), 2.0),
]
MEAN = HeadSpec(pooling="mean")
DENSE = HeadSpec(pooling="first", hidden=7, activation="tanh")


def make_model(
    kind: str,
    rule: PositionRule,
    head: HeadSpec = MEAN,
    num_outputs: int = 3,
    **placement: Any,
) -> ClassifierModel:
    """On a tiny encoder, with everything trained moved away from where it starts."""
    torch.manual_seed(3)
    options = {"method": "loreft", "layers": (0, 1, 2), "rank": 2} | placement
    placed = Placement.on(loaded(kind).description, options.pop("method"), **options)
    trained = TrainableHead(head, HIDDEN_SIZE, num_outputs)
    model = ClassifierModel(encoder(kind), placed, trained, num_units=rule.num_units)
    move(model.trainable())
    return model


def collator(kind: str, rule: PositionRule, *, regression: bool = False) -> TextCollator:
    pad_id = encoder(kind).config.pad_token_id
    return TextCollator(rule, regression=regression, segments=kind == "bert", pad_id=pad_id)


def naive_outputs(kind: str, model: ClassifierModel, rule: PositionRule) -> Tensor:
    """Logits (B, L), one unpadded text at a time, pooling and head written out."""
    found = []
    for row in ROWS:
        inputs = {"input_ids": torch.tensor([row.tokens])}
        if kind == "bert":
            inputs["token_type_ids"] = torch.tensor([row.segments])
        layers = find_layers(model.base)
        with edited_row_by_row(layers, model.interventions, rule, len(row.tokens)):
            output = model.base(**inputs)
        states = output.last_hidden_state[0]
        spec, head = model.head.spec, model.head
        pooled = {
            "first": states[0],
            "mean": sum(states) / len(states),
            "pooler": output.pooler_output[0],
        }[spec.pooling]
        if spec.hidden is not None:
            inner = pooled @ head.dense_weight + head.dense_bias
            pooled = activate(spec.activation, inner)
        found.append((pooled @ head.out_weight + head.out_bias) * head.scale + head.shift)
    return torch.stack(found)


def check(kind: str, model: ClassifierModel, rule: PositionRule) -> None:
    batch = collator(kind, rule)(ROWS)
    result = model(**batch)
    outputs = naive_outputs(kind, model, rule)
    loss = torch.nn.functional.cross_entropy(outputs, batch["labels"])
    assert_close(result["logits"], outputs)
    assert_close(result["loss"], loss)
    parameters = model.trainable()
    found, expected = (gradients(parameters, each) for each in (result["loss"], loss))
    assert expected.abs().max() > 1e-3
    assert_close(found, expected)


@pytest.mark.parametrize("head", [MEAN, DENSE, HeadSpec(pooling="pooler")])
@pytest.mark.parametrize(
    ("positions", "tied"),
    [("f3", True), ("l1", True), ("f1+l2", False), ("prompt", True), ("0,-2", True)],
)
@pytest.mark.parametrize("kind", ENCODERS)
def test_loss_and_gradients_are_the_naive_ones(
    kind: str, positions: str, tied: bool, head: HeadSpec
) -> None:
    rule = PositionRule.parse(positions, tied=tied)
    check(kind, make_model(kind, rule, head), rule)


@pytest.mark.parametrize("positions", ["f2", "prompt"])
@pytest.mark.parametrize("method", [name for name, kind in METHODS.items()
                                    if kind.sites != ("heads",)])  # fmt: skip
def test_every_method_of_the_registry_trains(method: str, positions: str) -> None:
    rule = PositionRule.parse(positions)
    linear = next(name for name in loaded("bert").description.sites if name.endswith("value"))
    # A layer of BERT has no module that is its whole MLP, or its whole attention.
    has_own_site = METHODS[method].sites[0] in loaded("bert").description.sites
    sites = None if has_own_site else (linear,)
    check("bert", make_model("bert", rule, method=method, sites=sites), rule)


def test_nothing_below_the_first_edited_layer_is_recorded() -> None:
    rule = PositionRule.parse("f1")
    model = make_model("bert", rule, layers=(1,))
    recorded = []
    handles = [
        layer.register_forward_hook(
            lambda _module, _args, output: recorded.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
        for layer in find_layers(model.base)
    ]
    model(**collator("bert", rule)(ROWS))["loss"].backward()
    for handle in handles:
        handle.remove()
    assert recorded == [False, False, True], "layer 1 is seen before its own edit"
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_a_head_alone_reads_each_text_once() -> None:
    rule = PositionRule.parse("f1")
    torch.manual_seed(0)
    head = TrainableHead(MEAN, HIDDEN_SIZE, 3)
    model = ClassifierModel(encoder("bert"), None, head, num_units=1)
    num_read = []
    handle = model.base.register_forward_pre_hook(
        lambda _module, _args, kwargs: num_read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    make_batch = collator("bert", rule)
    first = model(**make_batch(ROWS[:2]))
    again = model(**make_batch(ROWS))
    model(**make_batch(ROWS[::-1]))
    handle.remove()
    assert num_read == [2, 1]
    assert_close(again["logits"][:2], first["logits"])
    assert_close(again["logits"], naive_outputs("bert", model, rule))
    again["loss"].backward()
    assert head.out_weight.grad is not None
    assert model.trainable() == list(head.parameters())


def test_a_regression_learns_in_units_of_the_targets_spread() -> None:
    rule = PositionRule.parse("f3")
    model = make_model("bert", rule, num_outputs=1)
    model.head.start_from([10.0, 20.0, 60.0], regression=True)
    batch = collator("bert", rule, regression=True)(ROWS)
    result = model(**batch)
    outputs = naive_outputs("bert", model, rule)[:, 0]
    variance = ((10 - 30) ** 2 + (20 - 30) ** 2 + (60 - 30) ** 2) / 3
    assert_close(result["logits"][:, 0], outputs)
    assert_close(result["loss"], (outputs - batch["labels"]).square().mean() / variance)


def test_the_head_starts_with_the_labels_shares() -> None:
    head = TrainableHead(MEAN, 4, 3)
    head.start_from([0.0, 0.0, 0.0, 1.0], regression=False)
    shares = head(torch.zeros(1, 4)).softmax(-1)[0]
    assert_close(shares.detach(), torch.tensor([3.0, 1.0, 0.5]) / 4.5)


def test_dropout_acts_in_training_only() -> None:
    head = TrainableHead(MEAN, 64, 2, dropout=0.5)
    pooled = torch.ones(1, 64)
    assert not torch.equal(head(pooled), head(pooled))
    head.eval()
    assert torch.equal(head(pooled), head(pooled))
    assert torch.equal(head(pooled), head.to_head().logits(pooled))
