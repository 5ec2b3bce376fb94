"""The page of a report: what it shows, and what it does with a stranger's text."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import test_kinds as kinds
from tests.trainer.factories import byte_model, make_config, write_rows
from trainer.evaluation.scoring import OTHER
from trainer.report.chart import Series, line_chart
from trainer.report.document import to_document
from trainer.report.page import Cell, _matrix, render_page
from trainer.train import train

HOSTILE = '<script>alert("1")</script>&amp;<b onclick=x>'


class Reader(HTMLParser):
    """All elements in order, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a tiny labeller of whose rows one is hostile."""
    folder = tmp_path_factory.mktemp("run")
    labelling = {"labels": ("y", "n"), "positions": "f1+l2", "tied": False, "epochs": 4}
    config = make_config(folder, description=HOSTILE, **labelling)
    rows = [{"instruction": HOSTILE, "completion": "y"}, {"instruction": "b", "completion": "n"}]
    write_rows(folder / "test.jsonl", list(rows))
    return to_document(train(config, loaded=byte_model(), command=f"reft train '{HOSTILE}'"))


def test_a_strangers_text_is_text(document: dict[str, Any]) -> None:
    page = render_page(document)
    reader = Reader(page)
    assert "<script" not in page
    assert not reader.named("script")
    assert all("onclick" not in attrs for _, attrs in reader.elements)
    assert reader.text.count(HOSTILE) >= 3  # description, row and command
    policy = next(a for a in reader.named("meta") if "http-equiv" in a)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_string_of_a_document_may_be_hostile(document: dict[str, Any]) -> None:
    """As it is where report.json is a stranger's."""

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: poisoned(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [poisoned(inner) for inner in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) else value

    kept = {name: document[name] for name in ("given", "sample_metric")}
    kept["base"] = poisoned(document["base"]) | {"kind": document["base"]["kind"]}
    labels = [f"{HOSTILE}{label}" for label in "yn"]
    counts = {label: {**dict.fromkeys(labels, 1), OTHER: 1} for label in labels}
    kept["confusion"] = {f"test{HOSTILE}": counts}
    reader = Reader(render_page(poisoned(document) | kept))
    assert not reader.named("script")
    assert all("onclick" not in attrs for _, attrs in reader.elements)


def test_the_page_needs_nothing_else(document: dict[str, Any]) -> None:
    page = render_page(document)
    reader = Reader(page)
    linked = [a.get("href") for a in reader.named("a")]
    assert linked
    assert all(link and link.startswith("#") for link in linked)
    ids = {attrs["id"] for _, attrs in reader.elements if "id" in attrs}
    assert {link[1:] for link in linked if link} <= ids
    assert not re.search(r"https?://|url\(|@import|\bsrc=", page)


def test_it_shows_what_was_measured_chosen_and_edited(document: dict[str, Any]) -> None:
    reader = Reader(render_page(document))
    for fact in (document["adapter"]["digest"], "label_choice", "Answers by label"):
        assert fact in reader.text
    for choice in document["choices"].values():
        assert choice["why"] in reader.text
    marks = reader.named("mark")
    assert [mark["class"] for mark in marks] == ["unit0", "unit1", "unit1"]
    assert marks[0]["title"] == "position 0, unit 0"
    assert document["environment"]["torch"] in reader.text


def test_a_matrix_counts_answers_by_right_label() -> None:
    counts = {"a": {"a": 3, "b": 1, OTHER: 0}, "b": {"a": 0, "b": 0, OTHER: 0}}
    matrix = _matrix("valid", counts)
    assert matrix.columns == ["a", "b"], "no column for answers that nobody gave"
    (name, cells, share), empty = matrix.rows
    assert (name, share) == ("a", 0.75)
    assert cells == [Cell(3, 0.75, True), Cell(1, 0.25, False)]
    assert empty == ("b", [Cell(0, 0, False), Cell(0, 0, True)], None)
    counts["b"][OTHER] = 2
    other = _matrix("valid", counts)
    assert other.columns == ["a", "b", OTHER]
    assert other.rows[1] == ("b", [Cell(0, 0, False), Cell(0, 0, True), Cell(2, 1, False)], 0)


def test_charts_have_a_line_for_each_measure_and_say_what_they_are(
    document: dict[str, Any],
) -> None:
    reader = Reader(render_page(document))
    (chart,) = reader.named("svg")
    assert chart["role"] == "img"
    assert chart["aria-label"] == "Loss: training, validation, by step"
    drawn = {line["class"]: line["points"].split() for line in reader.named("polyline")}
    assert len(drawn["train"]) == document["num_steps"] == 20
    assert len(drawn["valid"]) == 5


def test_a_head_on_an_encoder_has_a_second_chart_and_no_base_answers(tmp_path: Path) -> None:
    starts = {"train": (0, 40), "valid": (900, 12)}
    config = kinds.write_splits(
        tmp_path, {split: kinds.labelled_rows(*place) for split, place in starts.items()}
    )
    found = to_document(kinds.run(config, kinds.encoder(), steps=4, rank=2))
    reader = Reader(render_page(found))
    labels = [chart["aria-label"] for chart in reader.named("svg")]
    assert labels[1] == "Metrics of the validation rows: accuracy, matthews, by step"
    assert "somewhat hopeful" in reader.text
    assert "The adapter, asked" in reader.text


def test_an_encoder_decoder_has_a_page_too(tmp_path: Path) -> None:
    rows = [{"instruction": f"copy {n}", "completion": "one"} for n in range(20)]
    config = kinds.write_splits(tmp_path, {"train": rows[:14], "valid": rows[14:]})
    found = to_document(kinds.run(config, kinds.encoder_decoder(), steps=2, rank=2))
    assert found["base"]["kind"] == "seq2seq"
    reader = Reader(render_page(found))
    assert len(reader.named("mark")) == found["prompt"]["num_tokens"]


def test_long_values_and_groups_of_answers_are_cut(document: dict[str, Any]) -> None:
    many = copy.deepcopy(document)
    sample = many["samples"]["test"][0] | {"adapter_score": 0.0, "base_score": 0.5}
    many["samples"]["test"] = [sample] * 50
    text = Reader(render_page(many)).text
    assert "Not right: 50 of 50, 20 shown" in text
    assert "0.50" in text


@pytest.mark.parametrize(
    ("points", "ticks"),
    [
        ([(0, 12.5), (100, 0.2)], ["0.1", "1", "10", "100"]),  # a ratio above 30: logarithmic
        ([(0, 1.0), (100, 0.2)], ["0.2", "0.4", "0.6", "0.8", "1"]),
        ([(0, 2.0), (1, 2.0)], ["2", "2.5"]),
        ([(0, 0.0), (7, -1.0)], ["-1", "-0.8", "-0.6", "-0.4", "-0.2", "0"]),
    ],
)
def test_axes_have_round_numbers(points: list[tuple[float, float]], ticks: list[str]) -> None:
    drawn = line_chart("Loss", "loss", [Series("a", "valid", points)])
    found = re.findall(r'<text class="tick y"[^>]*>([^<]*)<', drawn)
    assert found == ticks
    assert ("logarithmic" in drawn) == ("100" in ticks)
    places = [
        float(number) for number in re.findall(r"[\d.]+", re.findall('points="(.*?)"', drawn)[0])
    ]
    assert all(0 <= place <= 720 for place in places)


def test_a_charts_words_are_escaped() -> None:
    drawn = line_chart(
        HOSTILE, HOSTILE, [Series(HOSTILE, "valid", [(0, 1.0), (1, 2.0)], dots=True)]
    )
    assert "<script" not in drawn
    assert "onclick=x>" not in drawn
