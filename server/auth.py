"""Bearer keys: who may use ``/v1`` and who may use ``/admin``."""

from __future__ import annotations

import hmac

from fastapi import HTTPException, Request
from pydantic import SecretStr

_SCHEME = "bearer "


def require_key(request: Request, expected: SecretStr | None) -> None:
    """Raise 401 unless the request carries ``expected`` as its bearer key; None admits all."""
    if expected is None:
        return
    given = request.headers.get("authorization", "")
    has_scheme = given.lower().startswith(_SCHEME)
    key = given[len(_SCHEME) :].strip().encode("utf-8", "surrogateescape")
    # Compared even without the scheme, and in constant time, so timing tells nothing.
    matches = hmac.compare_digest(key, expected.get_secret_value().encode())
    if not (has_scheme and matches):
        problem = "wrong" if has_scheme else "missing"
        raise HTTPException(
            401,
            f"authorization: {problem} key, expected 'Bearer <key>' with this server's key",
            headers={"WWW-Authenticate": "Bearer"},
        )
