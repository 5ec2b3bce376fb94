from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.chaos.ledger import Ledger, State
from benchmarks.services.postgres import find_binaries


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_server_killed_while_adapters_change_loses_nothing(backend):
    if backend == "postgresql" and find_binaries() is None:
        pytest.skip("PostgreSQL's server is not installed (/usr/lib/postgresql/*/bin/initdb)")
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "2", "--no-save"]
    done = subprocess.run([*command, "--backend", backend], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["kills"], summary["lost_uploads"], summary["half_written"]) == (2, 0, 0)
    assert sum(summary["acknowledged"].values()) > 0
    assert summary["interrupted_changes"] > 0


def test_a_lost_upload_is_noticed():
    ledger = Ledger("tone")
    ledger.settle(ledger.uploaded("a"))
    ledger.settle(ledger.uploaded("b"))
    kept = State({1: "a"}, 1)
    assert ledger.lost(kept) == 1
    assert len(ledger.judge(kept)) == 1


def test_a_change_in_doubt_may_have_happened_or_not():
    ledger = Ledger("tone")
    ledger.settle(ledger.uploaded("a"))
    before = ledger.state
    ledger.doubtful = after = ledger.uploaded("b")
    assert (ledger.lost(before), ledger.lost(after)) == (0, 0)
    assert ledger.judge(after) == []
    ledger.doubtful = State()
    assert ledger.lost(State()) == 0
    assert ledger.judge(after) == []
    assert ledger.uploaded("c").current == 3
