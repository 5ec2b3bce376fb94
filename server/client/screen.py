"""Answers on a terminal, or in a pipe: as they come, one below or several beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.cli.text import printable
from server.client.answer import Answer

_LEAST_WIDTH = 28
"""Of a column; models that would get less stand in a further row."""
_JOINER = "\N{ZERO WIDTH JOINER}"
_REFRESHES_PER_S = 12


class Screen:
    """Where a conversation is shown: answers on ``out``, all else on ``notes``."""

    def __init__(self, out: Console, notes: Console) -> None:
        self._out = out
        self._notes = notes

    def note(self, message: str | RenderableType, style: str = "dim") -> None:
        """Say something that is no answer."""
        if isinstance(message, str):
            message = Text(message, style=style)
        self._notes.print(message, soft_wrap=isinstance(message, Text))

    def error(self, message: str) -> None:
        """Say what went wrong, in one line."""
        self.note(f"error: {message}", style="red")

    def show(self, chunks: Iterable[Mapping[str, Any]], models: tuple[str, ...]) -> Answer:
        """Show an answer as it comes, of several models in columns, then who gave it.

        Ctrl-C ends it early; what had come is the answer then.
        """
        answer = Answer()
        if len(models) > 1:
            self._beside(answer, chunks, models)
        else:
            self._below(answer, chunks)
        self.note(summary(answer, len(models)))
        return answer

    def _below(self, answer: Answer, chunks: Iterable[Mapping[str, Any]]) -> None:
        with _stoppable(answer):
            for chunk in chunks:
                for _, text in answer.take(chunk):
                    # Not rich's print, which would break words to measure them.
                    self._out.file.write(shown(text))
                    self._out.file.flush()
        self._out.file.write("\n")
        self._out.file.flush()

    def _beside(
        self, answer: Answer, chunks: Iterable[Mapping[str, Any]], models: tuple[str, ...]
    ) -> None:
        if not self._out.is_terminal:
            with _stoppable(answer):
                for chunk in chunks:
                    answer.take(chunk)
            self._out.print(columns(answer, models, self._out.width))
            return
        live = Live(console=self._out, refresh_per_second=_REFRESHES_PER_S, transient=True)
        with live, _stoppable(answer):
            for chunk in chunks:
                if answer.take(chunk):
                    live.update(columns(answer, models, self._out.width))
        # Once more outside, where nothing is cut at the terminal's height.
        self._out.print(columns(answer, models, self._out.width))


@contextmanager
def _stoppable(answer: Answer) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        answer.stopped = True


def columns(answer: Answer, models: tuple[str, ...], width: int) -> RenderableType:
    """The answers of several models beside each other, each under its name."""
    a_row = max(1, width // _LEAST_WIDTH)
    rows = [range(start, min(start + a_row, len(models))) for start in range(0, len(models), a_row)]
    return Group(*(_row(answer, models, row) for row in rows))


def _row(answer: Answer, models: tuple[str, ...], places: range) -> Table:
    table = Table(expand=True, show_lines=True)
    for place in places:
        table.add_column(Text(models[place]), ratio=1, overflow="fold")
    texts = [answer.texts[place] if place < len(answer.texts) else "" for place in places]
    table.add_row(*(Text(shown(text)) for text in texts))
    table.add_row(*(Text(_who(answer.report_of(place)), style="dim") for place in places))
    return table


def summary(answer: Answer, num_models: int) -> str:
    """Who gave an answer, how much was edited, how fast it came."""
    parts = [] if num_models > 1 else [_who(answer.report_of(0))]
    parts.append(f"{answer.num_tokens} tokens")
    if (rate := answer.tokens_per_s) is not None:
        parts.append(f"{rate:.1f} tokens/s")
    if (ttft := answer.ttft_s) is not None:
        parts.append(f"first after {ttft:.2f} s")
    if answer.stopped:
        parts.append("stopped")
    elif "length" in answer.finish_reasons:
        parts.append("cut at max_tokens")
    return " · ".join(part for part in parts if part)


def _who(report: Mapping[str, Any]) -> str:
    """The adapter, its version and digest, and its edits; empty on servers that do not say."""
    if not report:
        return ""
    names = [report] if report.get("adapter") else []
    names += report.get("stack") or []
    known = [f"{_name(each)}@{each['version']} {each['digest'][:12]}" for each in names]
    return f"{' + '.join(known) or 'base model'} · {report.get('num_edits', 0)} edits"


def _name(report: Mapping[str, Any]) -> str:
    return printable(str(report["adapter"]).partition("@")[0])


def shown(text: str) -> str:
    """``text`` without what would steer the terminal; joined emoji stay joined."""
    parts = text.replace("\t", "    ").split(_JOINER)
    return _JOINER.join(map(printable, parts))
