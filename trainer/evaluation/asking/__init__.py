"""Getting answers: from an engine in this process, an encoder's heads, or a server."""

from __future__ import annotations

from trainer.evaluation.asking.engine import EngineAsker
from trainer.evaluation.asking.interface import Asker, Contender, Question, Reply, Wanted
from trainer.evaluation.asking.ledger import Ledger

__all__ = [
    "Asker",
    "Contender",
    "EngineAsker",
    "Ledger",
    "Question",
    "Reply",
    "Wanted",
]
