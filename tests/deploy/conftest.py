"""Where the tools are that know Docker, Compose, Kubernetes and systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
CARRIED = {"hadolint", "docker-compose", "helm", "kubernetes-validate"}
"""What scripts/deploy-tools installs; other tools are the system's."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_tool() -> Run:
    """Runs a tool by name, in the project; skips the test if it is not installed.

    `make lint-deploy` installs those that packages carry, and sets DEPLOY_TOOLS_REQUIRED, with
    which one of them that is missing is a failure.
    """

    def run(
        name: str, *arguments: object, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        path = shutil.which(name, path=f"{PROJECT / '.venv-deploy/bin'}:{os.environ['PATH']}")
        if path is None:
            missing = f"{name} is not installed; scripts/deploy-tools says what brings it"
            if name in CARRIED and os.environ.get("DEPLOY_TOOLS_REQUIRED"):
                pytest.fail(missing)
            pytest.skip(missing)
        return subprocess.run(
            [path, *map(str, arguments)], cwd=PROJECT, capture_output=True, text=True, env=env
        )

    return run


def passed(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a tool that must have succeeded."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
