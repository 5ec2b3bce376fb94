"""Detached signatures of adapter files, by OpenSSF model-signing with an elliptic-curve key.

``model_signing sign key file --private_key key.pem --signature file.sig`` makes one.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from pathlib import Path
from typing import Any, Literal

from reft_core.errors import InvalidRequest, SignatureInvalid, explain
from server.registry.incoming import Incoming

SignaturePolicy = Literal["off", "if given", "required"]
MAX_SIGNATURE_CHARS = 6000
"""In base64. One file's is about 1,800; a header that a proxy lets pass has at most 8 KiB."""


class SignatureCheck:
    """Whether a file may be stored, as far as its signature goes."""

    def __init__(self, policy: SignaturePolicy, public_key: Path | None) -> None:
        """Raises :class:`InvalidRequest` if the policy cannot be kept: no package, no key."""
        self._policy = policy
        if policy == "off":
            return
        if public_key is None or not public_key.is_file():
            raise InvalidRequest.because(
                "signing_public_key", str(public_key), "a PEM file with the trusted public key"
            )
        try:
            from model_signing import verifying
        except ModuleNotFoundError:
            raise InvalidRequest(
                explain("signatures", policy, "'off', unless reft-serve[signing] is installed"),
                field="signatures",
            ) from None
        self._verifier: Any = verifying.Config().use_elliptic_key_verifier(public_key=public_key)

    def check(self, file: Incoming, signature: str | None) -> None:
        """Raise :class:`SignatureInvalid` unless the policy admits the file.

        ``signature`` is the signature file in base64, as it comes in a header.
        """
        if self._policy == "off" or (signature is None and self._policy == "if given"):
            return
        if signature is None:
            raise SignatureInvalid(
                "x-model-signature: missing, but required on this server",
                field="x-model-signature",
            )
        try:
            decoded = base64.b64decode(signature, validate=True)
        except (binascii.Error, ValueError):
            raise SignatureInvalid(
                "x-model-signature: expected the signature file in base64",
                field="x-model-signature",
            ) from None
        with tempfile.NamedTemporaryFile(suffix=".sig") as scratch:
            scratch.write(decoded)
            scratch.flush()
            try:
                self._verifier.verify(file.path, Path(scratch.name))
            except Exception as error:
                # The package raises whatever its parsers do: anything but a yes is a no.
                raise SignatureInvalid(
                    f"x-model-signature: does not sign this file with the trusted key "
                    f"({type(error).__name__})",
                    field="x-model-signature",
                ) from error
