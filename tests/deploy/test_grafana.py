"""The dashboard is one that Grafana imports as it stands; its queries are tests/observability's."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from tests.deploy.conftest import PROJECT

DASHBOARD = json.loads((PROJECT / "deploy/grafana/reft-serve.json").read_text())
PANELS = DASHBOARD["panels"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
"""Columns of Grafana's grid."""


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    """The cells of the grid that a panel takes."""
    x, y, w, h = (panel["gridPos"][side] for side in "xywh")
    return {(column, row) for column in range(x, x + w) for row in range(y, y + h)}


def test_it_is_a_dashboard_of_a_schema_that_grafana_reads() -> None:
    assert DASHBOARD["schemaVersion"] >= 36, "from 36 on a data source is an object"
    assert 0 < len(DASHBOARD["uid"]) <= 40
    assert DASHBOARD["title"]
    assert DASHBOARD.get("id") is None, "an id is one Grafana's own"


def test_panels_are_told_apart_and_explained() -> None:
    ids = Counter(panel["id"] for panel in PANELS)
    assert [number for number, count in ids.items() if count > 1 or number < 1] == []
    shown = [panel for panel in PANELS if panel["type"] != "row"]
    assert [panel["title"] for panel in shown if not panel.get("description")] == []
    for panel in shown:
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters) > 0, panel["title"]


def test_panels_lie_on_the_grid_and_not_on_each_other() -> None:
    for panel in PANELS:
        position = panel["gridPos"]
        assert min(position["w"], position["h"]) > 0
        assert 0 <= position["x"] <= WIDTH - position["w"], panel["title"]
    overlapping = [
        (one["title"], other["title"])
        for one, other in combinations(PANELS, 2)
        if cells(one) & cells(other)
    ]
    assert overlapping == []


def test_every_query_asks_the_data_source_that_the_reader_chose() -> None:
    variables = DASHBOARD["templating"]["list"]
    (source,) = (each for each in variables if each["type"] == "datasource")
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    queries = [each for each in variables if each["type"] == "query"]
    asking = [*queries, *(panel for panel in PANELS if panel["type"] != "row")]
    targets = [target for panel in PANELS for target in panel.get("targets", ())]
    assert [each for each in (*asking, *targets) if each["datasource"] != SOURCE] == []


@pytest.mark.parametrize("name", ["model", "instance"])
def test_the_variables_are_used(name: str) -> None:
    targets = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
    assert sum(f'=~"${name}"' in expression for expression in targets) > len(targets) / 2
