from __future__ import annotations

import hashlib
import hmac

import pytest

from server.keys import secret


def test_what_is_stored_does_not_contain_the_secret():
    text, kept = secret.generate()
    head, key_id, raw = text.split("_")
    assert (head, key_id, len(raw)) == ("reft", kept.id, 64)
    assert kept.digest == hashlib.sha256(raw.encode()).hexdigest()
    assert raw not in repr(kept)
    assert secret.parse(text) == kept


def test_no_two_keys_are_alike():
    made = [secret.generate() for _ in range(100)]
    assert len({text for text, _ in made}) == len({kept.id for _, kept in made}) == 100


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text + "0",
        lambda text: text.upper(),
        lambda text: " " + text,
        lambda text: text + "\n",
        lambda text: text.replace("reft_", "sk_"),
        lambda text: text[:-1] + "٣",  # a digit, but of another script
    ],
)
def test_what_is_no_key(change):
    text, _ = secret.generate()
    assert secret.parse(change(text)) is None


def test_only_the_stored_secret_is_right():
    _, mine = secret.generate()
    _, other = secret.generate()
    assert secret.is_right(mine, mine.digest)
    assert not secret.is_right(mine, other.digest)
    assert not secret.is_right(mine, None)


def test_the_secret_of_nobody_is_not_right_for_an_id_that_nobody_has():
    empty = secret.Presented("0" * 16, hashlib.sha256(b"").hexdigest())
    assert not secret.is_right(empty, None)


def test_every_outcome_takes_one_comparison_in_constant_time(monkeypatch):
    compared: list[tuple[int, int]] = []

    def spy(a, b):
        compared.append((len(a), len(b)))
        return hmac_compare(a, b)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(secret.hmac, "compare_digest", spy)
    _, mine = secret.generate()
    for stored in (mine.digest, "0" * 64, None):
        secret.is_right(mine, stored)
    assert compared == [(64, 64)] * 3
