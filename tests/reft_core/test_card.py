from __future__ import annotations

from typing import Any

import pytest
import yaml

from reft_core.adapter import Adapter, decode_adapter
from reft_core.card import metric_rows, model_card
from tests.server.fakes import make_adapter

TRAINING: dict[str, Any] = {
    "tool": "reft-serve 0",
    "command": "reft train a.jsonl",
    "seed": 3,
    "data": {"test_file": "test.jsonl", "test_rows": 60, "test_sha256": "ab" * 32},
    "hyperparameters": {"steps": 7},
    "metrics": {
        "test_exact_match": 0.75,
        "test_base_exact_match": 0.0,
        "test_loss": 0.5,
        "valid_exact_match": 0.5,
    },
}


def adapter(**fields: Any) -> Adapter:
    return decode_adapter(make_adapter(1, **fields))


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    document = yaml.safe_load(head)
    assert isinstance(document, dict)
    return document


def test_the_front_matter_is_what_a_hub_files_it_by() -> None:
    found = adapter(training=TRAINING, licence="Apache-2.0")
    head = front_matter(model_card(found, "me/tone", "org/base"))
    assert head["base_model"] == "org/base"
    assert head["library_name"] == "reft-serve"
    assert head["license"] == "apache-2.0"
    assert {"reft", found.spec.method} <= set(head["tags"])
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"]["split"] == "test"
    assert result["metrics"] == [{"type": "exact_match", "value": 0.75}]


def test_nothing_is_claimed_that_is_not_known() -> None:
    card = model_card(adapter())
    head = front_matter(card)
    assert head.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "## Results" not in card
    assert "--adapter OWNER/tone" in card


def test_another_licence_is_given_by_name() -> None:
    head = front_matter(model_card(adapter(licence="Ours-1")))
    assert (head["license"], head["license_name"]) == ("other", "Ours-1")


def test_the_data_set_of_a_hub_is_named() -> None:
    data = {"training": {"data": {"dataset": "org/rows"}}}
    assert front_matter(model_card(adapter(**data)))["datasets"] == ["org/rows"]


def test_the_card_says_how_to_serve_it_and_how_good_it_is() -> None:
    found = adapter(training=TRAINING)
    card = model_card(found, "me/tone")
    assert f"reft serve --model {found.spec.base.name} --adapter me/tone" in card
    assert "| test_exact_match | 0.0000 | 0.7500 |" in card
    assert found.digest in card
    assert "reft train a.jsonl" in card


@pytest.mark.parametrize("text", ["a | b", "<script>", "back\\slash"])
def test_cells_stay_cells(text: str) -> None:
    card = model_card(adapter(licence=text))
    (line,) = [line for line in card.splitlines() if line.startswith("| licence")]
    assert "<script" not in line
    assert line.replace("\\|", "").count("|") == 3


def test_a_metric_stands_beside_the_bases() -> None:
    rows = metric_rows(
        {
            "valid_loss": 1.0,
            "base_valid_loss": 9.0,
            "test_exact_match": 0.5,
            "test_base_exact_match": 0.25,
            "test_loss": 2.0,
        }
    )
    assert rows == [
        ("valid_loss", "9.0000", "1.0000"),
        ("test_exact_match", "0.2500", "0.5000"),
        ("test_loss", "", "2.0000"),
    ]
