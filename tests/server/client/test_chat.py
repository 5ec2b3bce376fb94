"""The chat in a terminal: commands, answers as they come, columns, and how things end."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from typer.testing import CliRunner

from reft_core.errors import ReftError
from server.cli.main import app
from server.client.answer import Answer
from server.client.chat import COMMANDS, Chat
from server.client.connection import Client
from server.client.conversation import Conversation
from server.client.prompt import ChatCompleter, converse
from server.client.screen import Screen, shown, summary
from tests.server.fakes import MODEL, make_adapter, wait_until

BASE = MODEL.name


class Talk:
    """A chat with everything it prints."""

    def __init__(self, client: Client, width: int = 100, **options) -> None:
        self.out, self.notes = io.StringIO(), io.StringIO()
        screen = Screen(Console(file=self.out, width=width), Console(file=self.notes, width=200))
        self.chat = Chat(client, Conversation((), **options), screen)

    @property
    def conversation(self) -> Conversation:
        return self.chat.conversation

    def said(self) -> str:
        text = self.notes.getvalue()
        self.notes.truncate(0)
        self.notes.seek(0)
        return text


@pytest.fixture
def server(live):
    live.digests = {name: live.upload(name, make_adapter(i))["digest"]
                    for i, name in enumerate(("tone", "voice"))}  # fmt: skip
    return live


@pytest.fixture
def talk(server) -> Iterator[Talk]:
    with Client(server.url, None, 20) as client:
        made = Talk(client)
        made.chat.begin()
        yield made


def test_the_base_answers_until_another_is_used(talk, server):
    talk.chat.ask("hi")
    assert talk.out.getvalue() == "I am base.\n"
    assert "base model · 0 edits" in talk.said()
    talk.chat.command("/use tone@1")
    assert "answers come from tone@1" in talk.said()
    talk.chat.ask("and you?")
    digest = server.digests["tone"]
    assert talk.out.getvalue().endswith(f"I am {digest[:6]}.\n")
    said = talk.said()
    assert f"tone@1 {digest[:12]}" in said
    assert re.search(r"[1-9]\d* edits · \d+ tokens · [\d.]+ tokens/s", said)
    talk.chat.command("/base")
    assert talk.conversation.models == (BASE,)


def test_what_was_said_goes_along_until_reset(talk, engine):
    talk.chat.command("/system Be brief.")
    talk.chat.ask("one")
    talk.chat.ask("two")
    prompt = engine.tokenizer.decode(engine.submitted[-1].prompt)
    for part in ("Be brief.", "one", "I am base.", "two"):
        assert part in prompt
    talk.chat.command("/reset")
    talk.chat.command("/system")
    talk.chat.ask("three")
    prompt = engine.tokenizer.decode(engine.submitted[-1].prompt)
    assert "three" in prompt
    assert "one" not in prompt
    assert "brief" not in prompt


def test_strength_goes_to_adapters_and_not_to_the_base(talk, engine):
    talk.chat.command("/strength 0.5")
    talk.chat.ask("hi")
    talk.chat.command("/use tone")
    talk.chat.ask("hi")
    assert engine.submitted[-1].adapters[0].strength == 0.5
    talk.chat.command("/strength")
    talk.chat.ask("hi")
    assert engine.submitted[-1].adapters[0].strength is None
    for wrong in ("much", "nan", "inf"):
        with pytest.raises(ReftError, match=r"strength: got .*0\.5"):
            talk.chat.command(f"/strength {wrong}")


def test_several_answer_side_by_side_from_one_request(talk, engine, server):
    talk.chat.command("/compare tone, voice base")
    before = engine.num_batches
    talk.chat.ask("hi")
    assert engine.num_batches == before + 1
    shown = talk.out.getvalue()
    (line,) = [line for line in shown.splitlines() if "I am base." in line]
    for name in ("tone", "voice"):
        assert f"I am {server.digests[name][:6]}." in line
        assert f"{name}@1 {server.digests[name][:12]}" in shown
    assert "tone" in shown.splitlines()[1]
    assert talk.conversation.messages[-1]["content"] == f"I am {server.digests['tone'][:6]}."


def test_more_models_than_fit_stand_below_each_other(server):
    with Client(server.url, None, 20) as client:
        talk = Talk(client, width=60)
        talk.chat.begin("tone", "voice", "base")
        talk.chat.ask("hi")
    lines = talk.out.getvalue().splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert sum("I am" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("line", "mention"),
    [
        ("/us tone", "expected '/use'"),
        ("/zzzz", "/help"),
        ("/use", "one model"),
        ("/use toone", "did you mean 'tone'"),
        ("/use tone@7", "tone@7"),
        ("/compare tone", "two models or more"),
        ("/save", "file"),
        ("/save /no/such/folder/x", "No such file"),
    ],
)
def test_a_wrong_command_says_what_is_right_and_changes_nothing(talk, line, mention):
    before = talk.conversation.models
    with pytest.raises(ReftError) as caught:
        talk.chat.command(line)
    assert mention in caught.value.message
    assert "\n" not in caught.value.message
    assert talk.conversation.models == before


def test_save_writes_what_can_be_sent_again(talk, server, tmp_path):
    talk.chat.command("/use tone")
    talk.chat.ask("hi")
    path = tmp_path / "talk.json"
    talk.chat.command(f"/save {path}")
    document = json.loads(path.read_text())
    assert [message["role"] for message in document["messages"]] == ["user", "assistant"]
    assert document["answered_by"][0]["digest"] == server.digests["tone"]
    with pytest.raises(ReftError, match="a new file's name"):
        talk.chat.command(f"/save {path}")


def test_lists_and_help(talk):
    talk.chat.command("/models")
    said = talk.said()
    for name in (BASE, "tone", "voice"):
        assert name in said
    talk.chat.command("/models voi")
    said = talk.said()
    assert "voice" in said
    assert "tone" not in said
    talk.chat.command("/help")
    said = talk.said()
    assert all(f"/{name}" in said for name in COMMANDS)
    assert not talk.chat.command("/quit")


def test_ctrl_c_stops_the_answer_and_keeps_what_came(server, engine, talk):
    engine.reply = lambda _: "abcdefghij" * 4

    class Interrupting(Client):
        def stream(self, body):
            for number, chunk in enumerate(super().stream(body)):
                yield chunk
                if number == 3:
                    raise KeyboardInterrupt

    with Interrupting(server.url, None, 20) as client:
        engine.pause()
        engine.step(4)
        talk.chat.client = client
        answer = talk.chat.ask("hi")
        assert answer.stopped
        assert answer.texts == ["abc"]
        assert talk.conversation.messages[-1]["content"] == "abc"
        assert "stopped" in talk.said()
        wait_until(lambda: engine.num_open == 0, "the server to stop too")
    engine.resume()


def test_an_error_in_the_middle_is_raised_and_nothing_is_kept(talk, engine):
    engine.reply = lambda _: "abcdefghij"
    engine.fail_after, engine.failure = 3, ReftError("it broke")
    with pytest.raises(ReftError, match="it broke"):
        talk.chat.ask("hi")
    assert talk.conversation.messages == []


def typed(talk: Talk, keys: str) -> None:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        converse(talk.chat)


def test_conversing_goes_on_after_errors_and_ctrl_c(talk):
    typed(talk, "hi\r/us x\rhalf a line\x03/use tone\rhi\r\x04")
    assert len(talk.conversation.messages) == 4
    said = talk.said()
    assert "error: command" in said
    assert "Ctrl-D" in said


def test_quit_ends(talk):
    typed(talk, "/quit\rnever sent\r")
    assert talk.conversation.messages == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/co", ["compare"]),
        ("/use to", ["tone"]),
        ("/compare tone v", ["voice"]),
        ("/compare tone ", ["base", BASE, "tone", "voice"]),
        ("/save t", []),
        ("hello /u", []),
    ],
)
def test_completion(talk, line, expected):
    found = ChatCompleter(talk.chat).get_completions(Document(line), CompleteEvent())
    assert [completion.text for completion in found] == expected


def test_answers_do_not_steer_the_terminal():
    assert shown("a\x1b[31mb\tc\n") == "a�[31mb    c\n"
    assert shown("👩‍👩‍👧") == "👩‍👩‍👧"


def test_a_server_that_is_not_ours():
    """No reports, no usage: what is known is shown, a chunk counting for a token."""
    answer = Answer()
    for text in ("a", "b", "c"):
        answer.take({"choices": [{"index": 0, "delta": {"content": text}}]})
    answer.take({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    assert answer.texts == ["abc"]
    line = summary(answer, 1)
    assert line.startswith("3 tokens")
    assert line.endswith("cut at max_tokens")


# The command ----------------------------------------------------------------------------------

runner = CliRunner()


def run(*args: str, stdin: str | None = None):
    return runner.invoke(app, ["chat", *args], input=stdin, env={"COLUMNS": "120"})


def test_one_message(server):
    result = run("--url", server.url, "-m", "hi", "--model", "tone")
    assert (result.exit_code, result.stdout) == (0, f"I am {server.digests['tone'][:6]}.\n")
    assert "tone@1" in result.stderr


def test_one_message_from_a_pipe_to_several(server):
    result = run("--url", server.url, "--compare", "tone", stdin="hi\n")
    assert result.exit_code == 0, result.output
    assert "I am base." in result.stdout
    assert server.digests["tone"][:6] in result.stdout


def test_one_message_as_json(server):
    result = run("--url", f"{server.url}/v1", "-m", "hi", "--json")
    assert json.loads(result.stdout)["messages"][1]["content"] == "I am base."


@pytest.mark.parametrize(
    ("args", "mention"),
    [
        (["--url", "http://127.0.0.1:9", "-m", "x"], "reft serve"),
        (["--url", "ftp://x", "-m", "x"], "url: got 'ftp://x'"),
        (["--url", "http://127.0.0.1:9", "-m", " "], "message: got ' '"),
        (["--url", "http://127.0.0.1:9", "-m", "x", "--config", "/none.yaml"], "9"),
        (["-m", "x", "--config", "/none.yaml"], "/none.yaml"),
        (["-m", "x", "--base", "/no/model", "--data-dir", "/dev/null/x"], "data_dir"),
    ],
)
def test_mistakes_are_one_line(args, mention, monkeypatch):
    # Logs would go to a stream that ends with the command, and stay there for later tests.
    monkeypatch.setattr("server.observability.logs.configure_logging", lambda *_: None)
    result = run(*args)
    assert result.exit_code == 1
    assert mention in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2  # the first may say what is started
    assert "Traceback" not in result.output


def test_an_unknown_model_is_one_line_with_the_nearest(server):
    result = run("--url", server.url, "-m", "hi", "--model", "toone")
    assert result.exit_code == 1
    assert "did you mean 'tone'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(server, engine):
    """The real command on a real terminal."""
    engine.reply = lambda _: "abcdefghij"
    engine.pause()
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "chat", "--url", server.url],
        stdin=follower, stdout=follower, stderr=follower, close_fds=True, start_new_session=True,
        env={**os.environ, "TERM": "xterm", "XDG_CONFIG_HOME": "/nonexistent"},
    )  # fmt: skip
    os.close(follower)
    seen = ""

    def until(text: str, repeat: Callable[[], None] = lambda: None, every_s: float = 60) -> None:
        """What ``text`` waits for is repeated now and then, as a person would."""
        nonlocal seen
        deadline = time.monotonic() + 60
        due = time.monotonic() + every_s
        while text not in seen:
            if time.monotonic() > due:
                due += every_s
                repeat()
            assert time.monotonic() < deadline, f"no {text!r} in {seen!r}"
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 65536).decode(errors="replace")
                if "\x1b[6n" in seen:  # the terminal is asked where its cursor is
                    seen = seen.replace("\x1b[6n", "")
                    os.write(leader, b"\x1b[1;1R")
        seen = seen.partition(text)[2]

    try:
        until("tiny-base>")
        os.write(leader, b"hi\r")
        wait_until(lambda: engine.num_open == 1, "the question to arrive")
        engine.step(3)
        until("abc")
        process.send_signal(signal.SIGINT)
        until("stopped", repeat=lambda: process.send_signal(signal.SIGINT), every_s=10)
        until("tiny-base>")
        os.write(leader, b"\x04")
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.1)[0]:
                try:
                    os.read(leader, 65536)
                except OSError:
                    break
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(10)
        os.close(leader)
        engine.resume()
