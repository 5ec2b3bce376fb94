"""Execution accuracy: a generated query finds what the reference finds.

A generated query is a stranger's code. It runs on a database opened read-only and immutable, by a
connection that may do nothing but read its tables, for a limited time, over limited memory.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from reft_core.errors import InvalidRequest
from trainer.evaluation.scoring.base import Answered, Need, Statistic, mean_of
from trainer.evaluation.scoring.extraction import sql_query

TIMEOUT_S = 5.0
MAX_ROWS = 100_000
_MAX_VALUE_BYTES = 1_000_000
_STEPS_BETWEEN_CHECKS = 1000
_ALLOWED = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit"})

Table = list[tuple[object, ...]]


@dataclass(frozen=True)
class ExecutionAccuracy:
    """The share of rows whose query finds the same rows as a reference does.

    The same as often as there, in any order unless the reference asks for one (``ORDER BY``), as
    Spider's evaluation compares them (Yu et al. 2018; Zhong et al. 2020).
    """

    name: str = "execution_accuracy"
    database: Path | None = None
    """The SQLite file."""
    timeout_s: float = TIMEOUT_S
    needs: Need = "text"
    percent: bool = True
    _known: dict[str, Table | None] = field(default_factory=dict, compare=False, repr=False)

    def row_scores(self, rows: Sequence[Answered]) -> list[float]:
        """1 for each row whose query finds the right rows."""
        return [
            float(any(self.agrees(row.text, right) for right in row.references)) for row in rows
        ]

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """The share in any samples of the rows."""
        return mean_of(self.row_scores(rows))

    def agrees(self, answer: str, reference: str) -> bool:
        """Whether the query in ``answer`` finds what ``reference`` does.

        Raises :class:`InvalidRequest` if the reference itself fails on the database.
        """
        right = sql_query(reference)
        wanted, found = self._result(right), self._result(sql_query(answer))
        if wanted is None:
            expected = f"a database on which the reference runs: {right}"
            raise InvalidRequest.because("database", str(self.database), expected)
        if found is None:
            return False
        return found == wanted if _is_ordered(right) else Counter(found) == Counter(wanted)

    def _result(self, query: str) -> Table | None:
        """The rows that a query finds; None if it fails, also on the limits."""
        if query not in self._known:
            if self.database is None:
                expected = "a SQLite file, with --database"
                raise InvalidRequest.because("database", None, expected)
            self._known[query] = run_query(self.database, query, self.timeout_s)
        return self._known[query]


def run_query(database: Path, query: str, timeout_s: float = TIMEOUT_S) -> Table | None:
    """The rows of ``query``; None if it fails, would do more than read, or is over a limit.

    Raises :class:`InvalidRequest` if there is no database at ``database``.
    """
    until = time.monotonic() + timeout_s
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(database.resolve()))}?mode=ro&immutable=1", uri=True
        )
    except sqlite3.Error as error:
        expected = f"a SQLite file ({error})"
        raise InvalidRequest.because("database", str(database), expected) from None
    with closing(connection):
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        connection.set_authorizer(_authorise)
        connection.set_progress_handler(lambda: time.monotonic() > until, _STEPS_BETWEEN_CHECKS)
        try:
            rows = connection.execute(query).fetchmany(MAX_ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
            return None
    return None if len(rows) > MAX_ROWS else [tuple(row) for row in rows]


def _authorise(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """SQLite asks this of everything that a statement would do."""
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _is_ordered(query: str) -> bool:
    """Whether the outermost query asks for an order: ORDER BY outside of all brackets."""
    depth, outside = 0, []
    for character in query.upper():
        depth += (character == "(") - (character == ")")
        outside.append(character if depth == 0 else " ")
    return "ORDER BY" in " ".join("".join(outside).split())
