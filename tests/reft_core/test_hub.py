from __future__ import annotations

import time

import pytest
from huggingface_hub import constants

from reft_core.errors import UnsupportedModel
from reft_core.hub import why_unreachable
from reft_core.loading import load_model, read_config

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that no connection leads to, in place of the real one; and no waiting for it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    template = NOBODY + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it is asked again"))


@pytest.mark.parametrize("load", [read_config, load_model])
def test_without_a_connection_loading_fails_at_once(load) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        load("nobody/none")
    for part in ("got 'nobody/none'", "no such folder", NOBODY, "refused"):
        assert part in str(caught.value)


def test_what_is_here_needs_no_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("reft_core.hub.get_hf_file_metadata", lambda url: pytest.fail(url))
    assert why_unreachable(str(tmp_path)) is None
    assert why_unreachable("/no/such/model") is None, "no hub knows a path"
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert why_unreachable("some/model") is None


@pytest.mark.parametrize("error", [TimeoutError("slow"), OSError("odd"), ValueError("gated")])
def test_a_hub_that_answers_badly_is_left_to_the_loader(monkeypatch, error) -> None:
    def fail(url: str) -> None:
        raise error

    monkeypatch.setattr("reft_core.hub.get_hf_file_metadata", fail)
    assert why_unreachable("some/model") is None
