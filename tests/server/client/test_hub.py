"""Adapters to a hub and back, over HTTP to one on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from reft_core.adapter import decode_adapter
from reft_core.card import CARD, PAGE, model_card
from reft_core.errors import AdapterTooLarge, InvalidRequest, ReftError
from reft_core.hub import ADAPTER_FILE, fetch_adapter
from server.app import adapter_files
from server.cli.main import app
from server.client.hub import push_to_hub
from tests.hub import TOKEN, Hub, running_hub
from tests.server.fakes import make_adapter

MAX_BYTES = 1 << 20


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub to which this process has a token."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "tone.safetensors"
    path.parent.mkdir()
    path.write_bytes(make_adapter(1))
    return path


# How the hub's client sends large files, where it may not use a protocol of its own.
@pytest.mark.filterwarnings("default:Use 'content:DeprecationWarning")
@pytest.mark.parametrize("as_large", [False, True])
def test_a_file_there_and_back(hub: Hub, file: Path, as_large: bool) -> None:
    hub.as_large = as_large
    address = push_to_hub(file, "me/tone")
    assert address.startswith(f"{hub.url}/me/tone/commit/")
    files = hub.repos["me/tone"]["main"]
    assert files.keys() == {ADAPTER_FILE, "README.md"}
    assert files[ADAPTER_FILE] == file.read_bytes()
    assert b"--adapter me/tone" in files["README.md"]
    assert fetch_adapter("me/tone", MAX_BYTES).read_bytes() == file.read_bytes()
    (registered,) = adapter_files([Path("me/tone")], MAX_BYTES).items()
    assert registered[1] == "tone"


def test_what_tells_of_this_adapter_goes_along(hub: Hub, file: Path) -> None:
    adapter = decode_adapter(file.read_bytes())
    card = f"{model_card(adapter)}\nMy own words.\n"
    file.with_name(CARD).write_text(card)
    file.with_name(PAGE).write_text(f"<p>{adapter.digest}")
    push_to_hub(file, "me/tone")
    files = hub.repos["me/tone"]["main"]
    assert b"My own words." in files["README.md"]
    assert b"OWNER/" not in files["README.md"]
    assert adapter.digest.encode() in files[PAGE]

    file.write_bytes(make_adapter(2))  # another one, of which neither tells
    push_to_hub(file, "me/other", base_model="org/base")
    files = hub.repos["me/other"]["main"]
    assert files.keys() == {ADAPTER_FILE, "README.md"}
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert head["base_model"] == "org/base"


def test_branches_and_later_versions(hub: Hub, file: Path) -> None:
    push_to_hub(file, "me/tone", private=True)
    first = file.read_bytes()
    file.write_bytes(make_adapter(2))
    push_to_hub(file, "me/tone", revision="next")
    assert hub.private == {"me/tone"}
    assert fetch_adapter("me/tone", MAX_BYTES).read_bytes() == first
    assert fetch_adapter("me/tone@next", MAX_BYTES).read_bytes() == file.read_bytes()
    assert [message.partition(" ")[0] for message in hub.messages] == ["tone", "tone"]


def test_what_was_fetched_serves_without_a_connection(
    hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(file, "me/tone")
    hub.repos["me/other"] = {"main": {"b.safetensors": b"other", "notes.txt": b""}}
    fetched = [fetch_adapter(name, MAX_BYTES) for name in ("me/tone", "me/other")]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch_adapter("me/tone", MAX_BYTES).read_bytes() == file.read_bytes()
    assert [fetch_adapter(name, MAX_BYTES) for name in ("me/tone", "me/other")] == fetched
    with pytest.raises(AdapterTooLarge, match="5 bytes', expected at most 4"):
        fetch_adapter("me/other", 4)
    with pytest.raises(InvalidRequest, match=r"no connection to http://127.0.0.1:9"):
        fetch_adapter("me/another", MAX_BYTES)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_leaves_the_kept_copy_which_is_said(
    hub: Hub, file: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    push_to_hub(file, "me/tone")
    fetched = fetch_adapter("me/tone", MAX_BYTES)
    assert not caplog.records
    hub.status = status
    assert fetch_adapter("me/tone", MAX_BYTES) == fetched
    (warning,) = [record for record in caplog.records if record.name == "reft_core.hub"]
    assert "me/tone: the copy that was fetched last is used" in warning.getMessage()
    assert f"status {status}" in warning.getMessage()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_hub_no_longer_gives_is_not_served_from_the_kept_copy(
    hub: Hub, file: Path, status: int
) -> None:
    push_to_hub(file, "me/tone")
    fetch_adapter("me/tone", MAX_BYTES)
    hub.status = status
    with pytest.raises(InvalidRequest, match=rf"'me/tone', expected .*status {status}"):
        fetch_adapter("me/tone", MAX_BYTES)


def test_what_a_repository_lacks_is_said(hub: Hub) -> None:
    with pytest.raises(InvalidRequest, match=r"'me/none', expected .*status 404"):
        fetch_adapter("me/none", MAX_BYTES)
    large = {"a.safetensors": b"x" * 99}
    hub.repos["me/a"] = {"main": large}
    hub.repos["me/two"] = {"main": {**large, "b.safetensors": b""}}
    with pytest.raises(AdapterTooLarge, match="99 bytes', expected at most 98"):
        fetch_adapter("me/a", 98)
    with pytest.raises(InvalidRequest, match="and not 2"):
        fetch_adapter("me/two", MAX_BYTES)


@pytest.mark.parametrize("name", ["me/a--b", "me/a..b", "me/tone.git", "me/.x"])
def test_a_name_that_no_hub_has_is_told(hub: Hub, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"adapters: got '{name}', expected a name that a hub"):
        fetch_adapter(name, MAX_BYTES)


@pytest.mark.parametrize(
    ("repo", "token", "reason"),
    [
        ("tone", TOKEN, "hub: got 'tone', expected OWNER/NAME"),
        ("me/a@b", TOKEN, "expected OWNER/NAME"),
        ("me/tone", "wrong", "does not know the token"),
        ("them/tone", TOKEN, "needs the permission to write"),
    ],
)
def test_refusals_say_what_to_do(
    hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch, repo: str, token: str, reason: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ReftError, match=reason):
        push_to_hub(file, repo)


def test_a_card_that_the_hub_refuses_is_told(hub: Hub, file: Path) -> None:
    hub.problem = '"license" must be one of …'
    with pytest.raises(ReftError, match=r'README\.md\. - "license" must be one of'):
        push_to_hub(file, "me/tone")


def test_nobody_there_and_no_token(
    hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ReftError, match=r"no connection to http://127.0.0.1:9"):
        push_to_hub(file, "me/tone")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ReftError, match="there is no token"):
        push_to_hub(file, "me/tone")


def test_the_command(hub: Hub, file: Path) -> None:
    result = CliRunner().invoke(app, ["adapter", "push", str(file), "--hub", "me/tone"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{hub.url}/me/tone/commit/")
    environment = {"REFT_TENANT": "acme", "REFT_ADMIN_KEY": "a" * 16}
    again = CliRunner().invoke(
        app, ["adapter", "push", str(file), "--hub", "me/tone"], env=environment
    )
    assert again.exit_code == 0, again.output
    neither = CliRunner().invoke(app, ["adapter", "push", str(file)])
    assert neither.exit_code == 2
