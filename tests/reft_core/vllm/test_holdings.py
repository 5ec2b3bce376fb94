"""Files of vLLM's workers: sent once, and dropped when the last who needs them is gone."""

from __future__ import annotations

import hashlib

import pytest

from reft_core.errors import AdapterError
from reft_core.vllm.holdings import Holdings


class Workers:
    """What they were told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.refusing = False
        self.holdings = Holdings(self.send, lambda digest: self.told.append(("drop", digest)))

    def send(self, file: bytes) -> None:
        self.told.append(("send", hashlib.sha256(file).hexdigest()))
        if self.refusing:
            raise AdapterError("not for this model")


def test_a_file_stays_until_nobody_needs_it() -> None:
    """Two adapters, and a request, need the same one."""
    workers = Workers()
    holdings = workers.holdings
    digest, again = holdings.load(b"file"), holdings.load(b"file")
    assert digest == again == hashlib.sha256(b"file").hexdigest()
    holdings.need([digest])
    assert workers.told == [("send", digest)]
    for _ in range(2):
        holdings.let_go([digest])
    assert workers.told == [("send", digest)]
    holdings.let_go([digest])
    assert workers.told == [("send", digest), ("drop", digest)]
    assert holdings.load(b"file") == digest
    assert workers.told[2:] == [("send", digest)]


def test_a_stack_may_name_a_file_twice() -> None:
    workers = Workers()
    digest = workers.holdings.load(b"file")
    workers.holdings.need([digest, digest])
    workers.holdings.let_go([digest])
    assert ("drop", digest) not in workers.told
    workers.holdings.let_go([digest, digest])
    assert workers.told[-1] == ("drop", digest)


def test_a_refused_file_is_taken_back_from_those_that_took_it() -> None:
    workers = Workers()
    workers.refusing = True
    with pytest.raises(AdapterError, match="not for this model"):
        workers.holdings.load(b"file")
    (_, digest), *rest = workers.told
    assert rest == [("drop", digest)]
    workers.refusing = False
    assert workers.holdings.load(b"file") == digest
    assert workers.told[2:] == [("send", digest)]


def test_what_another_sends_at_once_is_not_taken_back() -> None:
    """A load that fails while another of the same file is under way."""
    workers = Workers()
    holdings = workers.holdings

    def send(file: bytes) -> None:
        holdings._send = workers.send
        workers.refusing = True
        with pytest.raises(AdapterError):
            holdings.load(file)

    holdings._send = send
    digest = holdings.load(b"file")
    assert workers.told == [("send", digest)]
