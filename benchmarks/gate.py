"""Whether what is fast is also right: float32 tokens against plain transformers.

Each token must be the likeliest after the prompt and the tokens before it, as transformers
computes that in one forward; a token within ``TIE`` of the best logit counts as a tie. So a
sequence that took the other side of a tie is still checked to its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.compare import Measured
from benchmarks.peers.contenders import OURS, STATIC
from benchmarks.peers.protocol import PeerMissing, Worker

TIE = 1e-3
"""Largest distance in logits between the chosen token and the best."""

_SCORE_S = 300.0


@dataclass(frozen=True)
class Verdict:
    """How one peer's tokens compare with transformers' own."""

    equal: int
    """Sequences that are equal to those of ``generate``."""
    of: int
    largest_gap: float
    """Logits from the best, over all tokens."""

    @property
    def passed(self) -> bool:
        """Whether all tokens are right, ties allowed."""
        return self.largest_gap <= TIE


def judge(
    judge_worker: Worker, prompts: Sequence[Sequence[int]], measured: Mapping[str, Measured]
) -> dict[str, Verdict]:
    """A verdict for each peer; the worker is transformers' in float32."""
    expected = measured[STATIC].tokens
    verdicts = {}
    for peer, run in measured.items():
        answer = judge_worker.ask("score", _SCORE_S, prompts=prompts, tokens=run.tokens)
        same = [own == theirs for own, theirs in zip(run.tokens, expected, strict=True)]
        verdicts[peer] = Verdict(sum(same), len(same), max(answer["gaps"]))
    return verdicts


def gate(
    judge_worker: Worker | None,
    prompts: Sequence[Sequence[int]],
    measured: Mapping[str, Measured],
) -> tuple[bool, dict[str, Any]]:
    """Whether this project's tokens passed, and what is known of everybody's.

    What cannot be judged has not passed.
    """
    if judge_worker is None or OURS not in measured or STATIC not in measured:
        return False, {"error": f"needs {OURS} and {STATIC} in float32, and one was not measured"}
    try:
        verdicts = judge(judge_worker, prompts, measured)
    except PeerMissing as error:
        return False, {"error": str(error)}
    shown = {peer: {**asdict(v), "passed": v.passed} for peer, v in verdicts.items()}
    return verdicts[OURS].passed, shown
