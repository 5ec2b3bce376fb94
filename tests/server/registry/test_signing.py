from __future__ import annotations

import base64
from pathlib import Path

import pytest

from reft_core.errors import InvalidRequest
from server.registry.signing import SignatureCheck
from tests.server.conftest import ADMIN
from tests.server.fakes import make_adapter

PATH = "/admin/adapters/tone"


class Signer:
    """A key pair, and signatures by it as headers."""

    def __init__(self, folder: Path) -> None:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        pem = serialization.Encoding.PEM
        self._private = folder / "private.pem"
        self._private.write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        self.public = folder / "public.pem"
        self.public.write_bytes(
            key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        self._file = folder / "adapter.safetensors"

    def headers(self, data: bytes) -> dict[str, str]:
        from model_signing import signing

        self._file.write_bytes(data)
        signature = self._file.with_suffix(".sig")
        config = signing.Config().use_elliptic_key_signer(private_key=self._private)
        config.sign(self._file, signature)
        return {**ADMIN, "X-Model-Signature": base64.b64encode(signature.read_bytes()).decode()}


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    pytest.importorskip("model_signing", reason="reft-serve[signing] is not installed")
    return Signer(tmp_path / "keys")


def test_where_signatures_are_required_only_signed_files_are_stored(in_process, signer, tmp_path):
    data, other = make_adapter(1), make_adapter(2)
    stranger = Signer(tmp_path / "other keys")
    bad = {
        "none": ADMIN,
        "no base64": {**ADMIN, "X-Model-Signature": "%%%"},
        "no signature": {**ADMIN, "X-Model-Signature": base64.b64encode(b"{}").decode()},
        "another file's": signer.headers(other),
        "another key's": stranger.headers(data),
    }
    with in_process(signatures="required", signing_public_key=signer.public) as server:
        for case, headers in bad.items():
            answer = server.http.post(PATH, content=data, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                400,
                "signature_invalid",
            ), case
        assert server.http.get(PATH, headers=ADMIN).status_code == 404
        assert server.http.post(PATH, content=data, headers=signer.headers(data)).is_success


def test_if_given_a_signature_must_be_right(in_process, signer):
    data = make_adapter(1)
    with in_process(signatures="if given", signing_public_key=signer.public) as server:
        wrong = server.http.post(PATH, content=data, headers=signer.headers(make_adapter(2)))
        assert wrong.status_code == 400
        assert server.http.post(PATH, content=data, headers=signer.headers(data)).is_success
        assert server.http.post(PATH, content=make_adapter(3), headers=ADMIN).is_success


def test_a_policy_without_a_key_does_not_start(tmp_path):
    for key in (None, tmp_path / "none.pem"):
        with pytest.raises(InvalidRequest, match="signing_public_key"):
            SignatureCheck("required", key)
