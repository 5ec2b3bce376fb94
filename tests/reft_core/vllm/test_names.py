"""Adapters as model names: which routes of vLLM's server take them, and with what beside."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from reft_core.errors import AdapterNotFound
from reft_core.vllm.names import with_adapters

DIGEST = "ab" * 32


class FakeCatalog:
    """Two adapters: ``plain``, and ``templated`` with a chat template of its own."""

    digests = {"plain": "cd" * 32, "templated": DIGEST}  # noqa: RUF012

    def resolve(self, name: str) -> str:
        if name not in self.digests:
            raise AdapterNotFound(f"adapter: got {name!r}", field="adapter")
        return self.digests[name]

    def find(self, digest: str) -> Any:
        template = "{{ messages }}" if digest == DIGEST else None
        return SimpleNamespace(spec=SimpleNamespace(name="templated", template=template))


async def check_model(_serving: Any, _request: Any) -> None:
    return None


def answer(**fields: Any) -> tuple[str | None, Any]:
    """The error a request with these fields gets, if any, and the request."""
    serving = SimpleNamespace(
        models=SimpleNamespace(
            is_base_model=lambda name: name == "base",
            input_processor=SimpleNamespace(reft_catalog=FakeCatalog()),
        ),
        create_error_response=lambda message, param=None: message,
    )
    request = SimpleNamespace(**fields)
    return asyncio.run(with_adapters(check_model)(serving, request)), request


def test_a_name_becomes_an_adapter_once_and_again() -> None:
    xargs = None
    for _ in range(2):  # some routes check twice
        error, request = answer(model="plain", vllm_xargs=xargs, messages=[])
        assert error is None
        xargs = request.vllm_xargs
        assert xargs == {"reft": "plain"}


def test_a_route_that_takes_no_adapters_says_so() -> None:
    error, _ = answer(model="plain", messages=[])
    assert error is not None
    assert "'plain'" in error
    assert "SimpleNamespace" in error
    assert answer(model="base", messages=[])[0] is None
    assert answer(messages=[])[0] is None


def test_a_name_and_another_adapter_contradict_each_other() -> None:
    error, _ = answer(model="plain", vllm_xargs={"reft": "templated"}, prompt="")
    assert error is not None
    assert error.startswith("vllm_xargs.reft")


@pytest.mark.parametrize("chat", [{"messages": []}, {"input": "hello"}])
@pytest.mark.parametrize(
    "named",
    [
        {"model": "templated", "vllm_xargs": None},
        {"model": "base", "vllm_xargs": {"reft": DIGEST}},
        {
            "model": "base",
            "vllm_xargs": {"reft": '{"adapters": [{"name": "plain"}, {"name": "templated"}]}'},
        },
    ],
)
def test_a_chat_without_the_adapters_template_is_refused(
    named: dict[str, Any], chat: dict[str, Any]
) -> None:
    error, _ = answer(**named, **chat)
    assert error is not None
    assert "template" in error
    assert answer(**named, prompt="hello")[0] is None
