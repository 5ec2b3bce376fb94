"""docker-compose.yml, as Compose itself reads it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import PROJECT, Run, passed

EXAMPLE = PROJECT / "deploy/compose/env.example"
NAMES = re.findall(r"^([A-Z_0-9]+)=$", EXAMPLE.read_text(), flags=re.MULTILINE)
SECRETS = [name for name in NAMES if re.search(r"KEY|PASSWORD", name)]
OPTIONAL = {"TORCH_INDEX_URL"}


def _config(run_tool: Run, given: dict[str, str]) -> Any:
    """What `docker compose config` says with these variables and no others."""
    env = {"PATH": os.environ["PATH"], **given}
    return run_tool(
        "docker-compose", "--env-file", "/dev/null", "config", "--format", "json", env=env
    )


@pytest.fixture(scope="module")
def stack(run_tool: Run) -> dict[str, Any]:
    """The stack with every variable set to a word of its own."""
    done = _config(run_tool, {name: f"given-{name.lower()}" for name in NAMES})
    return dict(json.loads(passed(done)))


def test_every_health_check_is_waited_for(stack: dict[str, Any]) -> None:
    services = stack["services"]
    assert {"server", "postgres", "store", "prometheus", "grafana"} <= set(services)
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert services[name]["healthcheck"]["test"]
            else:
                assert how["condition"] == "service_completed_successfully"
                assert services[name]["restart"] == "no"


@pytest.mark.parametrize("name", sorted(set(NAMES) - OPTIONAL))
def test_it_refuses_to_start_without(name: str, run_tool: Run) -> None:
    given = {other: "given" for other in NAMES if other != name}
    for empty in ({}, {name: ""}):
        done = _config(run_tool, given | empty)
        assert done.returncode != 0
        assert f"required variable {name} is missing a value" in done.stderr


def test_no_secret_has_a_default(stack: dict[str, Any]) -> None:
    given = {f"given-{name.lower()}" for name in NAMES}
    for service in stack["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"KEY|PASSWORD|SECRET|_URL$", name) and name != "REFT_BLOB_URL":
                assert any(word in value for word in given), name
    assert len(SECRETS) == 6


def test_only_loopback_is_published(stack: dict[str, Any]) -> None:
    published = [p for s in stack["services"].values() for p in s.get("ports", [])]
    assert published
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


def test_networks_hold_the_parts_apart(stack: dict[str, Any]) -> None:
    services = stack["services"]
    assert stack["networks"]["data"]["internal"]
    on_data = {name for name, service in services.items() if "data" in service["networks"]}
    assert on_data == {"server", "bucket", "postgres", "store"}
    assert set(services["postgres"]["networks"]) == {"data"}
    assert not [name for name in ("postgres", "store") if services[name].get("ports")]


def test_the_server_is_restrained(stack: dict[str, Any]) -> None:
    for service in stack["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    server = stack["services"]["server"]
    assert server["read_only"]
    assert {volume["target"] for volume in server["volumes"]} == {
        "/var/lib/reft-serve",
        "/var/cache/reft-serve",
        "/models",
    }


def test_docker_waits_longer_than_the_server_drains(stack: dict[str, Any]) -> None:
    server = stack["services"]["server"]
    grace = re.fullmatch(r"(\d+)s", server["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) >= int(server["environment"]["REFT_DRAIN_TIMEOUT_S"]) + 10


def test_every_setting_exists(stack: dict[str, Any]) -> None:
    from server.settings import Settings

    names = {n for n in stack["services"]["server"]["environment"] if n.startswith("REFT_")}
    known = {f"REFT_{field.upper()}" for field in Settings.model_fields}
    assert names <= known


def test_what_is_mounted_from_the_project_is_there(stack: dict[str, Any]) -> None:
    for service in stack["services"].values():
        for volume in service.get("volumes", []):
            source = Path(volume["source"])
            if volume["type"] == "bind" and source.is_relative_to(PROJECT / "deploy"):
                assert source.exists(), volume["source"]


def test_no_image_floats(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        if name not in ("server", "bucket"):
            assert re.search(r":v?\d+", service["image"]), service["image"]


def test_prometheus_takes_its_configuration(run_tool: Run) -> None:
    path = PROJECT / "deploy/compose/prometheus.yml"
    passed(run_tool("promtool", "check", "config", "--syntax-only", path))
    ours, plain = (
        yaml.safe_load(file.read_text())
        for file in (path, PROJECT / "deploy/prometheus/prometheus.yml")
    )
    [job] = ours["scrape_configs"]
    assert job.pop("authorization") == {"credentials_file": "/run/secrets/metrics_key"}
    job["metrics_path"] = "/metrics"
    assert ours == plain


def test_prometheus_gets_the_key_it_shows(stack: dict[str, Any]) -> None:
    [secret] = stack["services"]["prometheus"]["secrets"]
    assert secret["source"] == "metrics_key"
    assert stack["secrets"]["metrics_key"]["environment"] == "REFT_ADMIN_KEY"
