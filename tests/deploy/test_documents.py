"""docs/operations.md against what it describes."""

from __future__ import annotations

import re

import pytest
import yaml

from server.settings import Settings
from tests.deploy.conftest import PROJECT

TEXT = (PROJECT / "docs/operations.md").read_text()
SECURITY = (PROJECT / "docs/security.md").read_text()
LIMITS = dict(re.findall(r"^\| `REFT_(\w+)` \| ([^|]+?) \|", TEXT, flags=re.MULTILINE))
ALERTS = PROJECT / "deploy/prometheus/alerts.yml"
_IS_LIMIT = re.compile(
    r"max_\w+|key_(requests|tokens|max)_\w+|\w+_(timeout_s|wait_s|memory_bytes|cache_bytes)|kv_tokens"
)


def test_every_limit_is_in_the_table() -> None:
    limits = {name for name in Settings.model_fields if _IS_LIMIT.fullmatch(name)}
    assert limits - {name.lower() for name in LIMITS} == set()


@pytest.mark.parametrize("name", LIMITS)
def test_the_table_has_the_defaults(name: str) -> None:
    default = Settings.model_fields[name.lower()].default
    assert LIMITS[name] == ("none" if default is None else str(default))


@pytest.mark.parametrize("text", [TEXT, SECURITY])
def test_files_that_are_named_exist(text: str) -> None:
    named = set(re.findall(r"`((?:deploy|scripts|docs)/[\w./-]+)`", text))
    missing = {name for name in named if not (PROJECT / name).exists()}
    assert missing == set()


@pytest.mark.skipif(not ALERTS.exists(), reason="there are no alert rules")
def test_every_alert_says_what_to_do() -> None:
    rules = [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]
    alerts = {rule["alert"] for rule in rules if "alert" in rule}
    described = set(re.findall(r"\*\*(Reft\w+)\*\*", TEXT))
    assert described == alerts
