"""The systemd units, by systemd's own tools."""

from __future__ import annotations

import re
from pathlib import Path

from tests.deploy.conftest import PROJECT, Run, passed

FOLDER = PROJECT / "deploy/systemd"
UNIT = (FOLDER / "reft-serve.service").read_text()
MOST_EXPOSURE = 20
"""In tenths: systemd calls 2.0 and less safe enough."""


def test_the_unit_is_well_formed(run_tool: Run, tmp_path: Path) -> None:
    # systemd also looks whether the command exists, which only an installation has.
    path = tmp_path / "reft-serve.service"
    path.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT, flags=re.MULTILINE))
    drop_in = tmp_path / "reft-serve.service.d"
    drop_in.mkdir()
    (drop_in / "gpu.conf").write_text((FOLDER / "gpu.conf").read_text())
    done = run_tool("systemd-analyze", "verify", "--man=no", path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_service_may_do_little(run_tool: Run) -> None:
    unit = FOLDER / "reft-serve.service"
    limit = f"--threshold={MOST_EXPOSURE}"
    passed(run_tool("systemd-analyze", "security", "--offline=yes", limit, unit))


def test_systemd_waits_longer_than_the_server_drains() -> None:
    stop = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, flags=re.MULTILINE)
    drain = re.search(r"REFT_DRAIN_TIMEOUT_S=(\d+)", UNIT)
    assert stop is not None
    assert drain is not None
    assert int(stop[1]) >= int(drain[1]) + 10


def test_account_and_folders_are_what_the_unit_names(run_tool: Run) -> None:
    output = run_tool("systemd-sysusers", "--dry-run", FOLDER / "reft-serve.sysusers")
    assert output.returncode == 0, output.stderr
    assert "reft-serve" in output.stdout + output.stderr
    file = re.search(r"^EnvironmentFile=(\S+)$", UNIT, flags=re.MULTILINE)
    assert file is not None
    assert f"f {file[1]} 0600 root root -" in (FOLDER / "reft-serve.tmpfiles").read_text()


def test_the_page_that_the_unit_names_is_installed() -> None:
    page = re.search(r"^Documentation=file:(\S+)$", UNIT, flags=re.MULTILINE)
    assert page is not None
    steps = (PROJECT / "docs/operations.md").read_text()
    assert f"install -D -m 644 docs/operations.md {page[1]}\n" in steps


def test_syscalls_are_listed_that_exist(run_tool: Run) -> None:
    for name in re.findall(r"@[a-z-]+", UNIT):
        passed(run_tool("systemd-analyze", "syscall-filter", name))
