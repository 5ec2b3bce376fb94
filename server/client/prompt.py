"""The line where somebody types: history, completion, and what Ctrl-C and Ctrl-D mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from reft_core.errors import ReftError
from server.client.chat import COMMANDS, Chat
from server.client.conversation import BASE


def converse(chat: Chat, history: Path | None = None) -> None:
    """Read messages and commands until Ctrl-D or ``/quit``. A failure ends only its message."""
    session: PromptSession[str] = PromptSession(
        history=_history(history), completer=ChatCompleter(chat), complete_while_typing=False
    )
    while True:
        try:
            line = session.prompt(f"{', '.join(chat.conversation.models)}> ").strip()
            if not line:
                continue
            if not line.startswith("/"):
                chat.ask(line)
            elif not chat.command(line):
                return
        except ReftError as error:
            chat.screen.error(error.message)
        except KeyboardInterrupt:
            chat.screen.note("Ctrl-D or /quit ends the chat")
        except EOFError:
            return


class ChatCompleter(Completer):
    """Completes commands, and models after the commands that take them."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        """What may stand where the cursor is."""
        line = document.text_before_cursor
        if not line.startswith("/"):
            return
        word, space, rest = line[1:].partition(" ")
        if not space:
            for name in (*COMMANDS, "quit"):
                if name.startswith(word):
                    yield Completion(name, start_position=-len(word))
            return
        command = COMMANDS.get(word)
        if command is None or not command.takes_models:
            return
        begun = "" if rest.endswith(" ") or not rest else rest.split()[-1]
        for name in (BASE, *self._chat.names):
            if name.startswith(begun):
                yield Completion(name, start_position=-len(begun))


def _history(path: Path | None) -> History:
    """The history in a file that only its owner reads; in memory where there can be none."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()
