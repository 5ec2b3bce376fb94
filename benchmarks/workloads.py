"""What is asked of every engine: how many requests, how long, and the text they are cut from."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_OWN_TEXT = Path(__file__).parent / "prompts.txt"
_TEXT_FIELDS = ("instruction", "text")


@dataclass(frozen=True)
class Workload:
    """Requests that are submitted at once, answered greedily and to full length."""

    name: str
    input_lengths: tuple[int, ...]
    """Prompt tokens of each request."""
    output_tokens: int
    """Of each request; end-of-text tokens end nothing."""

    @property
    def num_generated(self) -> int:
        """Tokens that all requests generate together."""
        return len(self.input_lengths) * self.output_tokens

    @property
    def title(self) -> str:
        """As a table shows it."""
        low, high = min(self.input_lengths), max(self.input_lengths)
        length = f"{low}" if low == high else f"{low} to {high}"
        return f"{self.name}: {len(self.input_lengths)} x {length} in / {self.output_tokens} out"


def spread(low: int, high: int, count: int) -> tuple[int, ...]:
    """``count`` lengths from ``low`` to ``high`` in equal steps, in an order that mixes them."""
    lengths = [low + round(i * (high - low) / max(count - 1, 1)) for i in range(count)]
    random.Random(count).shuffle(lengths)
    return tuple(lengths)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("a", (64,) * 16, 64),
        Workload("b", spread(82, 218, 16), 64),
        Workload("c", spread(82, 218, 64), 64),
        Workload("d", (64,), 64),
    )
}


def own_passages() -> list[str]:
    """Sentences that come with the benchmarks."""
    return re.split(r"(?<=[.?!])\s+", _OWN_TEXT.read_text().strip())


def data_passages(folder: Path, limit: int = 5000) -> list[str]:
    """Texts and instructions from the ``*.jsonl`` files below ``folder``.

    Raises :class:`ValueError` when there are none.
    """
    passages: list[str] = []
    for path in sorted(folder.rglob("*.jsonl")):
        with path.open() as lines:
            for line, _ in zip(lines, range(limit // 10), strict=False):
                row = json.loads(line)
                passages += [row[name] for name in _TEXT_FIELDS if row.get(name)]
    if not passages:
        raise ValueError(f"data: got {folder}, expected *.jsonl files with 'text' or 'instruction'")
    return random.Random(0).sample(passages, min(limit, len(passages)))


def prompts_of(
    lengths: Sequence[int],
    passages: Sequence[str],
    encode: Callable[[str], list[int]],
    seed: int,
) -> list[list[int]]:
    """One prompt of token ids for each length: passages in a random order, cut to the length.

    As long as there are passages enough, no two prompts begin alike: an engine that computes
    equal beginnings once would have less to do.
    """
    shuffler = random.Random(seed)
    everything = range(len(passages))
    firsts = shuffler.sample(everything, len(passages))
    prompts = []
    for number, length in enumerate(lengths):
        order = shuffler.sample(everything, len(passages))
        text = ""
        for index in (firsts[number % len(firsts)], *order):
            text += passages[index] + " "
            if len(text) > 8 * length:  # no tokenizer of English needs as many characters
                break
        tokens = encode(text)
        while len(tokens) < length:  # short passages, or a long prompt: begin again
            tokens += encode(text)
        prompts.append(tokens[:length])
    return prompts
