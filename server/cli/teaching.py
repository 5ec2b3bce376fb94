"""A training that ends on a server: what is looked at before, and what is done after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from reft_core.adapter import check_same_shape
from reft_core.convert.base import base_from_folder
from reft_core.errors import AdapterMismatch, ReftError
from reft_core.spec import BaseModelSpec
from server.cli.push import upload
from server.client.address import api_url
from server.client.admin import AdminClient
from server.client.connection import document, in_words, options

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.data import Example
    from trainer.train import TrainResult

_TIMEOUT_S = 120.0
_MAX_TOKENS = 64


@dataclass(frozen=True)
class Taught:
    """What a server has learnt, and what it says to a row that was kept apart."""

    reference: str
    """The adapter's name and version."""
    url: str
    question: str
    expected: str
    answers: Mapping[str, str] | None
    """Of base, if it answers, and adapter; None if the server was not asked."""
    reason: str = ""
    """Why it was not."""


class Teaching:
    """One server that is to have what is trained."""

    def __init__(self, url: str, key: str, user_key: str | None, tenant: str) -> None:
        self._url = url
        self._user_key = user_key
        self._admin = AdminClient(url, key, tenant)
        self._base = ""

    def check(self, config: TrainConfig) -> None:
        """Raise :class:`ReftError` unless the server is there, takes the key, and its base has
        the shape of the one that is trained on."""
        listed = self._admin.call("GET", "/admin/adapters", query={"limit": 1})
        if "base" not in listed:
            raise ReftError(f"serve: {self._url} does not say which model it serves")
        served = BaseModelSpec.model_validate(listed["base"])
        ours = base_from_folder(config.model)
        try:
            check_same_shape(served, ours)
        except AdapterMismatch as error:
            raise ReftError(
                f"serve: {self._url} serves {served.name}, and model is {config.model!r}, of "
                f"another shape ({error.message})"
            ) from None
        self._base = served.name

    def teach(self, result: TrainResult) -> Taught:
        """Upload the adapter, and ask it and the base the first row that was kept apart.

        A server that has it and cannot be asked is no failure. Raises :class:`ReftError`.
        """
        card = upload(self._admin, result.config.output)
        reference = f"{card['name']}@{card['version']}"
        example = result.datasets[result.last_split].examples[0]
        asks = self._classified if result.kind == "encoder" else self._generated
        answers, reason = None, ""
        try:
            answers = asks(reference, example, result.config.max_new_tokens or _MAX_TOKENS)
        except ReftError as error:
            reason = error.message
        expected = example.completion if example.label is None else str(example.label)
        return Taught(reference, self._url, example.question, expected, answers, reason)

    def _generated(self, reference: str, example: Example, max_tokens: int) -> dict[str, str]:
        """Greedy answers, in one request."""
        found = self._post(
            "/chat/completions",
            {
                "model": reference,
                "messages": example.messages,
                "temperature": 0,
                "max_tokens": max_tokens,
                "reft": {"models": [self._base, reference]},
            },
        )
        base, adapter = (choice["message"]["content"] for choice in found["choices"])
        return {"base": base, "adapter": adapter}

    def _classified(self, reference: str, example: Example, _: int) -> dict[str, str]:
        """The likeliest label, or the score."""
        text, *pair = example.texts
        body = {"model": reference, "input": text, "text_pair": pair[0] if pair else None}
        (found,) = self._post("/classify", body)["data"]
        said = found["value"] if found.get("label") is None else found["label"]
        return {"adapter": str(said)}

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        url = api_url(self._url)
        with in_words(url, has_timeout=False):
            with httpx.Client(**options(url, self._user_key, _TIMEOUT_S)) as http:
                response = http.post(path, json=body)
            return document(response)
