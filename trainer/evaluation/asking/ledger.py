"""Replies on disk, as they come: a run that was interrupted asks only what it has no reply to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.evaluation.asking.interface import Asker, Question, Reply

log = logging.getLogger(__name__)


class Ledger:
    """A file of JSON lines, each a reply and the key of the question it answers.

    Lines are only ever added. One that was cut off by a crash is passed over.
    """

    def __init__(self, path: Path | None) -> None:
        """``path`` None keeps replies in memory."""
        self._path = path
        self._known = {} if path is None else _read(path)

    def find(self, question: Question) -> Reply | None:
        """The reply to a question, if it is known."""
        return self._known.get(question.key)

    def ask(self, asker: Asker, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """The place and the reply of each question, the known ones first.

        The others are asked, questions with the same key once, and noted as they are answered.
        """
        places: dict[str, list[int]] = {}
        for place, question in enumerate(questions):
            if (reply := self.find(question)) is not None:
                yield place, reply
            else:
                places.setdefault(question.key, []).append(place)
        groups = list(places.values())
        for index, reply in asker.ask([questions[group[0]] for group in groups]):
            self._note(questions[groups[index][0]].key, reply)
            for place in groups[index]:
                yield place, reply

    def _note(self, key: str, reply: Reply) -> None:
        self._known[key] = reply
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **reply.to_json()}, ensure_ascii=False)
        # Behind a line that a crash cut off, begin a new one.
        start = "\n" if _ends_within_a_line(self._path) else ""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{start}{line}\n")


def _read(path: Path) -> dict[str, Reply]:
    """The replies in a file, by key; none if there is no file."""
    found: dict[str, Reply] = {}
    if not path.exists():
        return found
    num_bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            key = document.pop("key")
            found[key] = Reply.from_json(document)
        except (ValueError, TypeError, KeyError, AttributeError):
            num_bad += 1
    if num_bad:
        log.warning("%s: %d lines are no replies, and are asked again", path, num_bad)
    return found


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
