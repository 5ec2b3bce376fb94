from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.keys.store import open_store
from server.settings import Settings
from tests.server.conftest import ADMIN_KEY

KEY = re.compile(r"reft_([0-9a-f]{16})_[0-9a-f]{64}")


def run(*args: str, **env: str):
    return CliRunner().invoke(app, ["key", *args], env={"COLUMNS": "200"} | env)


def made(result) -> str:
    """The key that a command printed, alone on standard output."""
    assert result.exit_code == 0, result.output
    assert KEY.fullmatch(result.stdout.strip()), result.stdout
    return result.stdout.strip()


def test_keys_in_the_database_itself(tmp_path: Path):
    where = ("--data-dir", str(tmp_path))
    admin = made(run("create", "root", "--admin", *where))
    limits = ("--requests-per-minute", "5", "--max-concurrency", "0", "--expires-in-days", "1.5")
    scope = ("--tenant", "acme", "--model", "a*", "--model", "b", "--may-upload")
    user = made(run("create", "a bot", *scope, *limits, *where))
    with open_store(Settings(data_dir=tmp_path)) as store:
        first, second = store.all()
        if first.kind == "user":  # both may be of one second
            first, second = second, first
    assert (first.id, first.kind, first.tenant) == (admin[5:21], "admin", "")
    assert (second.id, second.kind, second.tenant) == (user[5:21], "user", "acme")
    assert (second.models, second.may_upload) == (("a*", "b"), True)
    assert (second.requests_per_minute, second.max_concurrency) == (5, 0)
    assert second.tokens_per_minute is None
    assert second.expires_at == second.created_at + 129_600
    listed = run("list", *where).output
    assert all(part in listed for part in (first.id, second.id, "a bot", "acme", "a* b", "active"))
    assert admin not in listed
    cards = json.loads(run("list", "--json", *where).stdout)
    assert {card["id"]: card["models"] for card in cards} == {
        first.id: ["*"],
        second.id: ["a*", "b"],
    }
    of_tenant = run("list", "--tenant", "acme", *where).output
    assert (first.id in of_tenant, second.id in of_tenant) == (False, True)
    revoked = run("revoke", second.id, *where)
    assert (revoked.exit_code, revoked.output) == (0, f"{second.id} revoked\n")
    assert "revoked" in run("list", *where).output


def test_the_first_admin_key_makes_others_through_a_running_server(on_socket, tmp_path):
    with on_socket(admin_key=None) as server:
        admin = made(run("create", "root", "--admin", "--data-dir", str(tmp_path / "data")))
        through = {"REFT_ADMIN_KEY": admin}
        there = ("--url", server.url)
        user = made(run("create", "bot", "--tenant", "acme", *there, **through))
        headers = {"Authorization": f"Bearer {user}"}
        assert server.http.get("/v1/models", headers=headers).status_code == 200
        assert user[5:21] in run("list", "--tenant", "acme", *there, **through).output
        assert run("revoke", user[5:21], *there, **through).exit_code == 0
        assert server.http.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("args", "mention"),
    [
        (("create", "bot", "--tenant", "A B"), "tenant"),
        (("create", "bot", "--model", "a@1"), "models"),
        (("create", "bot", "--requests-per-minute", "-1"), "requests_per_minute"),
        (("create", " "), "name"),
        (("revoke", "0" * 16), "reft key list"),
        (("revoke", "reft_" + "0" * 16 + "_" + "a" * 64), "16 hex digits"),
        (("list", "--url", "http://127.0.0.1:9"), "REFT_ADMIN_KEY"),
    ],
)
def test_what_cannot_work_is_one_clear_line(tmp_path, args, mention):
    where = () if "--url" in args else ("--data-dir", str(tmp_path))
    made(run("create", "first", "--data-dir", str(tmp_path)))
    result = run(*args, *where)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert mention in result.output
    assert "a" * 64 not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_what_the_server_says_is_shown(live):
    wrong = run("list", "--url", live.url, "--key", "wrong")
    assert (wrong.exit_code, "wrong key" in wrong.output) == (1, True)
    missing = run("revoke", "0" * 16, "--url", live.url, "--key", ADMIN_KEY)
    assert (missing.exit_code, "0" * 16 in missing.output) == (1, True)


def test_keys_are_where_the_settings_file_says(tmp_path: Path):
    """A server with that file would else never see them."""
    file = tmp_path / "reft.yaml"
    file.write_text("data_dir: kept\n")
    made_key = run("create", "bot", REFT_CONFIG=str(file))
    assert str(tmp_path / "kept" / "catalog.sqlite") in made_key.stderr.replace("\n", "")
    with open_store(Settings(data_dir=tmp_path / "kept")) as store:
        assert [key.id for key in store.all()] == [made(made_key)[5:21]]
    assert made(made_key)[5:21] in run("list", "--config", str(file)).output


def test_a_mistyped_folder_is_no_new_database(tmp_path: Path):
    there = ("--data-dir", str(tmp_path / "typo"))
    for command in (["list"], ["revoke", "0" * 16]):
        result = run(*command, *there)
        assert result.exit_code == 1
        assert "data_dir: got" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_an_id_can_be_copied_from_a_narrow_list(tmp_path: Path):
    where = ("--data-dir", str(tmp_path))
    long = ("--tenant", "a-tenant-of-some-length", "--model", "support-*", "--may-upload")
    key = made(run("create", "a bot of some length", *long, *where))
    assert key[5:21] in run("list", *where, COLUMNS="60").output
