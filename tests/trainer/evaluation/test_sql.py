"""Generated queries find what the references find, and can do nothing else."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from reft_core.errors import InvalidRequest
from trainer.evaluation.scoring import Answered, ExecutionAccuracy
from trainer.evaluation.scoring.sql import MAX_ROWS, run_query

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "rivers #1?.sqlite"  # characters that mean something in a URI
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE river (name TEXT, length INT)")
        rows = [("rhine", 1230), ("elbe", 1094), ("oder", 840), ("oder", 840)]
        connection.executemany("INSERT INTO river VALUES (?, ?)", rows)
        connection.commit()
    return path


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("SELECT name FROM river WHERE length > 1000;", "SELECT 'elbe' UNION SELECT 'rhine'", True),
        ("SELECT name FROM river", "SELECT DISTINCT name FROM river", False),
        (
            "SELECT length FROM river ORDER BY length",
            "SELECT length FROM river ORDER BY length DESC",
            False,
        ),
        (
            "SELECT length FROM river ORDER BY length",
            "SELECT length FROM (SELECT length FROM river ORDER BY length DESC)",
            True,
        ),
        ("SELECT 840.0", "SELECT min(length) FROM river", True),
        ("SELEKT", "SELECT 1", False),
        ("", "SELECT 1", False),
    ],
)
def test_rows_are_compared_as_often_as_found_and_in_order_where_one_is_asked_for(
    database: Path, answer: str, reference: str, expected: bool
) -> None:
    metric = ExecutionAccuracy(database=database)
    assert metric.row_scores([Answered((reference,), text=answer)]) == [float(expected)]


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM river",
        "INSERT INTO river VALUES ('x', 1)",
        "CREATE TABLE other (x)",
        "CREATE TEMP TABLE other (x)",
        "ATTACH DATABASE '{folder}/new.sqlite' AS other",
        "VACUUM INTO '{folder}/new.sqlite'",
        "PRAGMA writable_schema = 1",
        "SELECT load_extension('x')",
        "BEGIN IMMEDIATE",
        "SELECT zeroblob(900000000)",
        "SELECT 1; DELETE FROM river",
        f"SELECT a.name FROM {', '.join(['river a', *(f'river r{n}' for n in range(9))])}",
    ],
)
def test_a_query_only_reads_and_only_so_much(database: Path, query: str) -> None:
    before = database.read_bytes()
    assert MAX_ROWS < 4**10
    assert run_query(database, query.replace("{folder}", str(database.parent))) is None
    assert database.read_bytes() == before
    assert [path.name for path in database.parent.iterdir()] == [database.name]


def test_an_endless_query_is_ended(database: Path) -> None:
    assert run_query(database, ENDLESS, timeout_s=0.05) is None


def test_a_missing_database_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"database: got .*none.sqlite"):
        run_query(tmp_path / "none.sqlite", "SELECT 1")
    (tmp_path / "text.sqlite").write_text("no database")
    with pytest.raises(InvalidRequest, match=r"text.sqlite.*the reference runs"):
        ExecutionAccuracy(database=tmp_path / "text.sqlite").agrees("SELECT 1", "SELECT x FROM y")
    with pytest.raises(InvalidRequest, match="--database"):
        ExecutionAccuracy().agrees("SELECT 1", "SELECT 1")
