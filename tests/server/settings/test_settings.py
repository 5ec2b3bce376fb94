from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings, is_loopback


def test_the_environment_is_read_and_arguments_win(monkeypatch):
    monkeypatch.setenv("REFT_PORT", "1234")
    monkeypatch.setenv("REFT_MODEL", "some/model")
    monkeypatch.setenv("REFT_ADAPTERS", os.pathsep.join(["a.safetensors", "folder"]))
    settings = Settings(model="other")
    assert (settings.port, settings.model) == (1234, "other")
    assert settings.adapters == (Path("a.safetensors"), Path("folder"))


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValidationError, match="prot"):
        Settings(prot=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, True),
        ({"require_keys": True}, False),
        ({"host": "0.0.0.0"}, False),
        ({"metrics_public": False}, False),
        ({"host": "0.0.0.0", "metrics_public": True}, True),
    ],
)
def test_who_sees_metrics(changes, shown):
    assert Settings(**changes).shows_metrics is shown


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.4", False),
        ("example.org", False),
    ],
)
def test_loopback_addresses(host, local):
    assert is_loopback(host) is local


def test_a_short_admin_key_is_refused_and_not_repeated():
    with pytest.raises(ValidationError) as caught:
        Settings(admin_key="hunter2")
    assert "hunter2" not in str(caught.value)
    assert "hunter2hunter2hunter2" not in repr(Settings(admin_key="hunter2hunter2hunter2"))


def test_one_adapter_must_fit_the_memory_for_all():
    with pytest.raises(ValidationError, match="max_adapter_bytes"):
        Settings(max_adapter_bytes=2**30, adapter_memory_bytes=2**20)
    with pytest.raises(ValidationError, match="16-bit"):
        Settings(max_adapter_bytes=2**20, adapter_memory_bytes=2**21 - 1)
    Settings(max_adapter_bytes=2**20, adapter_memory_bytes=2**21)


def test_pinned_names_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("REFT_PINNED_ADAPTERS", "tone, voice,")
    assert Settings().pinned_adapters == ("tone", "voice")


def test_auto_is_decided_once():
    assert Settings(device="cpu").resolve_device() == ("cpu", "float32")
    assert Settings(device="cuda:1").resolve_device() == ("cuda:1", "bfloat16")
    assert Settings(device="cpu", dtype="bfloat16").resolve_device() == ("cpu", "bfloat16")


def test_the_engine_gets_its_share():
    config = Settings(max_model_len=99, max_num_seqs=3, num_threads=1).engine_config()
    assert (config.max_model_len, config.max_num_seqs, config.num_threads) == (99, 3, 1)
