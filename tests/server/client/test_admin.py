"""Files and changes on their way to ``/admin``, and what is said when they are refused."""

from __future__ import annotations

import pytest

from reft_core.errors import ReftError
from server.client.address import adapter_path
from server.client.admin import AdminClient
from tests.server.conftest import ADMIN_KEY
from tests.server.fakes import make_adapter


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_a_file_there_and_back(live, tmp_path, suffix):
    file, out = tmp_path / "a", tmp_path / "b"
    file.write_bytes(make_adapter(1))
    sent: list[int] = []
    client = AdminClient(live.url + suffix, ADMIN_KEY)
    card = client.upload(adapter_path("tone"), file, {}, sent.append)
    assert sum(sent) == file.stat().st_size
    assert client.download(adapter_path("tone@1", "/file"), out) == card["digest"]
    assert out.read_bytes() == file.read_bytes()


def test_tenants_are_asked_for(live, tmp_path):
    file = tmp_path / "a"
    file.write_bytes(make_adapter(1))
    own = AdminClient(live.url, ADMIN_KEY, "acme")
    own.upload(adapter_path("tone"), file, {}, lambda _: None)
    assert own.call("GET", adapter_path("tone"))["name"] == "tone"
    with pytest.raises(ReftError, match="got 'tone'"):
        AdminClient(live.url, ADMIN_KEY).call("GET", adapter_path("tone"))


def test_a_file_refused_before_it_was_read_is_refused_with_the_reason(on_socket, tmp_path):
    file = tmp_path / "large"
    with file.open("wb") as out:
        out.truncate(64 << 20)
    with on_socket(max_adapter_bytes=1 << 20) as server:
        for key, mention in ((ADMIN_KEY, "1048576"), ("wrong", "REFT_ADMIN_KEY")):
            client = AdminClient(server.url, key)
            with pytest.raises(ReftError) as caught:
                client.upload(adapter_path("large"), file, {}, lambda _: None)
            assert mention in caught.value.message


def test_nobody_there():
    with pytest.raises(ReftError, match=r"nothing answers at http://127.0.0.1:9 .*refused"):
        AdminClient("http://127.0.0.1:9", "x").call("GET", "/admin/adapters")
    with pytest.raises(ReftError, match="url: got 'file:"):
        AdminClient("file:///etc/passwd", "x")
