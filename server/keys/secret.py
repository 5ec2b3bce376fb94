"""What a key looks like, and what of it is stored.

``reft_<id>_<secret>``: the id, 16 hex digits, is public and finds the row; the secret, 64 hex
digits, is 256 random bits. Stored is only the secret's SHA-256: so many random bits cannot be
guessed from it, however fast the hash, so a slow one would only slow every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

_FORM = re.compile(r"reft_(?P<id>[0-9a-f]{16})_(?P<secret>[0-9a-f]{64})")
_NOBODY = hashlib.sha256(b"").hexdigest()


class Presented(NamedTuple):
    """A key as a request presents it."""

    id: str
    digest: str
    """SHA-256 of its secret, hex."""


def generate() -> tuple[str, Presented]:
    """A new key as its owner gets it, once, and what is kept of it."""
    text = f"reft_{secrets.token_hex(8)}_{secrets.token_hex(32)}"
    presented = parse(text)
    assert presented is not None, "a key has the form of keys"
    return text, presented


def parse(text: str) -> Presented | None:
    """The key in ``text``, None if it has another form."""
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    return Presented(match["id"], hashlib.sha256(match["secret"].encode()).hexdigest())


def is_right(presented: Presented, stored_digest: str | None) -> bool:
    """Whether the secret is the one stored; None if there is no such key.

    Takes the same time in every case, so that it tells nobody which ids exist or how much of a
    digest is right.
    """
    same = hmac.compare_digest(presented.digest, stored_digest or _NOBODY)
    return same and stored_digest is not None
