"""A chat in a terminal: one message after another, and the commands between them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from reft_core.errors import InvalidRequest, ReftError
from server.cli.text import printable
from server.client.answer import Answer
from server.client.connection import Client
from server.client.conversation import BASE, Conversation, parse_strength
from server.client.screen import Screen

_MOST_SHOWN = 50
"""Rows of ``/models``."""


class Chat:
    """One conversation with one server."""

    def __init__(self, client: Client, conversation: Conversation, screen: Screen) -> None:
        self.client = client
        self.conversation = conversation
        self.screen = screen
        self.names: list[str] = []
        """Models known from the last listing, for completion."""

    def begin(self, *models: str) -> None:
        """Learn what there is, and let ``models`` answer; without any, the base model.

        Raises :class:`ReftError`.
        """
        cards = self._list()
        bases = [card["id"] for card in cards if not card.get("parent")]
        self.conversation.base = bases[0] if bases else None
        if not models and not cards:
            raise ReftError("model: the server lists none; name one with --model")
        self.conversation.models = self._known(models or (bases or self.names)[:1])

    def ask(self, text: str) -> Answer:
        """Send a message and show its answer. Raises :class:`ReftError`."""
        chunks = self.client.stream(self.conversation.body(text))
        try:
            answer = self.screen.show(chunks, self.conversation.models)
        finally:
            chunks.close()  # type: ignore[attr-defined]  # a generator; the server stops too
        self.conversation.add(text, answer)
        return answer

    def command(self, line: str) -> bool:
        """Carry out one command; False if it ends the chat. Raises :class:`ReftError`."""
        word, _, rest = line.strip().removeprefix("/").partition(" ")
        if word in ("quit", "exit"):
            return False
        word = _ALSO.get(word, word)
        if word not in COMMANDS:
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            expected = f"'/{near[0]}'" if near else "one of those that /help lists"
            raise InvalidRequest.because("command", f"/{word}", expected)
        COMMANDS[word].run(self, rest.strip())
        return True

    def use(self, rest: str) -> None:
        """``/use``: another model answers."""
        if len(rest.split()) != 1:
            raise InvalidRequest.because("/use", rest, "one model, such as name or name@2")
        self.conversation.models = self._known([rest])
        self._say_who()

    def back_to_base(self, rest: str) -> None:
        """``/base``: the base model answers."""
        self.conversation.models = self._known([BASE])
        self._say_who()

    def compare(self, rest: str) -> None:
        """``/compare``: several models answer, side by side."""
        names = rest.replace(",", " ").split()
        if len(names) < 2:
            raise InvalidRequest.because("/compare", rest, "two models or more, or 'base'")
        self.conversation.models = self._known(names)
        self._say_who()

    def set_strength(self, rest: str) -> None:
        """``/strength``: how strongly adapters act; nothing: as they were made to."""
        self.conversation.strength = parse_strength(rest) if rest else None
        now = "each adapter's own" if not rest else str(self.conversation.strength)
        self.screen.note(f"strength: {now}")

    def set_system(self, rest: str) -> None:
        """``/system``: the system message; nothing: none."""
        self.conversation.system = rest or None
        self.screen.note(f"system message: {rest or 'none'}")

    def reset(self, rest: str) -> None:
        """``/reset``: forget what was said."""
        self.conversation.reset()
        self.screen.note("nothing said so far")

    def save(self, rest: str) -> None:
        """``/save``: what was said, in a new file."""
        if not rest:
            raise InvalidRequest.because("/save", rest, "a file's name")
        path = Path(rest).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self.conversation.document() + "\n")
        except FileExistsError:
            raise InvalidRequest.because("/save", rest, "a new file's name") from None
        except OSError as error:
            raise ReftError(f"{path}: {error.strerror}") from None
        self.screen.note(f"{len(self.conversation.messages)} messages saved in {path}")

    def list_models(self, rest: str) -> None:
        """``/models``: what there is to use, or what of it has ``rest`` in its name."""
        cards = [card for card in self._list() if rest.lower() in card["id"].lower()]
        table = Table("", "model", "version", "method", "positions", "description")
        for card in cards[:_MOST_SHOWN]:
            about: dict[str, Any] = card.get("reft") or {}
            mark = "•" if card["id"] in self.conversation.models else ""
            kind = "" if card.get("parent") else "base model"
            row = [mark, card["id"], about.get("version", ""), about.get("method", kind)]
            row += [about.get("positions", ""), about.get("description", "")]
            table.add_row(*(Text(printable(str(cell))) for cell in row))
        self.screen.note(table)
        if len(cards) > _MOST_SHOWN:
            self.screen.note(f"and {len(cards) - _MOST_SHOWN} more; '/models part' narrows them")

    def help(self, rest: str) -> None:
        """``/help``: the commands."""
        table = Table.grid(padding=(0, 2))
        for name, command in COMMANDS.items():
            table.add_row(Text(f"/{name} {command.usage}".strip(), style="bold"), command.summary)
        table.add_row(Text("/quit", style="bold"), "end, as Ctrl-D does; Ctrl-C stops an answer")
        self.screen.note(table)

    def _list(self) -> list[dict[str, Any]]:
        cards = self.client.models()
        self.names = [card["id"] for card in cards]
        return cards

    def _known(self, names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
        """``names`` as the server knows them. Raises :class:`ReftError` for one it does not."""
        return tuple(self._one_known(name) for name in names)

    def _one_known(self, name: str) -> str:
        if name in self.names:
            return name
        if name == BASE and self.conversation.base is not None:
            return self.conversation.base
        try:
            self.client.model(name)
        except ReftError as error:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; /models lists them"
            raise ReftError(f"{error.message}{hint}", field="model") from None
        return name

    def _say_who(self) -> None:
        self.screen.note(f"answers come from {', '.join(self.conversation.models)}")


@dataclass(frozen=True)
class Command:
    """One command between messages."""

    usage: str
    summary: str
    run: Callable[[Chat, str], None]
    takes_models: bool = False


_ALSO = {"model": "use"}
"""What the flags call it."""

COMMANDS: dict[str, Command] = {
    "use": Command("name@2", "let this model answer: name, name@version", Chat.use, True),
    "base": Command("", "let the base model answer", Chat.back_to_base),
    "compare": Command(
        "name other …",
        "ask several at once, side by side; the first one's answers are kept",
        Chat.compare,
        True,
    ),
    "models": Command("part", "list the models, or those named so", Chat.list_models),
    "strength": Command("0.5", "scale what adapters do; alone: back", Chat.set_strength),
    "system": Command("text", "set the system message; alone: none", Chat.set_system),
    "reset": Command("", "forget what was said", Chat.reset),
    "save": Command("file", "write what was said as JSON", Chat.save),
    "help": Command("", "this list", Chat.help),
}
