"""The Ray clusters of machines (Compose) and of nodes (Kubernetes), read by those tools."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any

import pytest
import yaml

from deploy.docker.dockerfile import read
from server.settings import Settings
from tests.deploy.conftest import PROJECT, Run, passed

FOLDER = PROJECT / "deploy/ray"
ROLES = ("head", "worker")
NAMES = {
    role: re.findall(r"^([A-Z_0-9]+)=$", (FOLDER / f"{role}.env.example").read_text(), re.MULTILINE)
    for role in ROLES
}
KNOWN = {f"REFT_{field.upper()}" for field in Settings.model_fields}


def _config(run_tool: Run, role: str, given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `docker compose config` says of one machine with these variables and no others."""
    env = {"PATH": os.environ["PATH"], **given}
    options = ("--env-file", "/dev/null", "--file", FOLDER / f"{role}.yml")
    return run_tool("docker-compose", *options, "config", "--format", "json", env=env)


@pytest.fixture(params=ROLES)
def machine(request: pytest.FixtureRequest, run_tool: Run) -> dict[str, Any]:
    """The one service of a machine."""
    done = _config(run_tool, request.param, dict.fromkeys(NAMES[request.param], "/given"))
    [service] = json.loads(passed(done))["services"].values()
    return dict(service)


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """What Kubernetes is given, by kind and name."""
    text = (FOLDER / "kubernetes.yaml").read_text()
    return {f"{o['kind']} {o['metadata']['name']}": o for o in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def container(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    [container] = objects["StatefulSet reft-ray"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize(("role", "name"), [(r, n) for r in ROLES for n in NAMES[r]])
def test_a_machine_does_not_start_without(role: str, name: str, run_tool: Run) -> None:
    given = {other: "/given" for other in NAMES[role] if other != name}
    done = _config(run_tool, role, given)
    assert done.returncode != 0
    assert f"required variable {name} is missing a value" in done.stderr


def test_a_machine_is_restrained_and_has_what_gpus_need(machine: dict[str, Any]) -> None:
    assert machine["cap_drop"] == ["ALL"]
    assert machine["security_opt"] == ["no-new-privileges:true"]
    assert machine["gpus"]
    assert int(machine["shm_size"]) >= 2**33
    assert machine["environment"]["RAY_AUTH_MODE"] == "token"


def test_keys_are_with_the_head_alone(run_tool: Run) -> None:
    done = _config(run_tool, "worker", dict.fromkeys(NAMES["worker"], "/given"))
    environment = json.loads(passed(done))["services"]["worker"]["environment"]
    assert not [name for name in environment if name.startswith(("REFT_", "AWS_"))]


def test_the_image_has_a_ray_that_knows_tokens() -> None:
    arguments = read(PROJECT / "Dockerfile").stages["dependencies-vllm"].instructions
    (asked,) = [i.pairs["RAY"] for i in arguments if i.name == "ARG" and "RAY" in i.pairs]
    oldest = re.fullmatch(r"ray\[cgraph\]>=(\d+)\.(\d+)", asked)
    assert oldest is not None
    assert tuple(map(int, oldest.groups())) >= (2, 52), "RAY_AUTH_MODE=token is refused by older"


def test_settings_exist(run_tool: Run, container: dict[str, Any]) -> None:
    done = _config(run_tool, "head", dict.fromkeys(NAMES["head"], "/given"))
    environment = json.loads(passed(done))["services"]["head"]["environment"]
    named = {*environment, *(entry["name"] for entry in container["env"])}
    assert {name for name in named if name.startswith("REFT_")} <= KNOWN


def test_settings_are_taken(
    run_tool: Run, container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _config(run_tool, "head", {**dict.fromkeys(NAMES["head"], "16"), "REFT_MODELS": "/m"})
    head = json.loads(passed(done))["services"]["head"]["environment"]
    pod = {entry["name"]: entry.get("value", "a" * 16) for entry in container["env"]}
    for environment in (head, pod):
        keys = {"REFT_API_KEY": "a" * 16, "REFT_ADMIN_KEY": "b" * 16}
        for name, value in (environment | keys).items():
            if name.startswith("REFT_"):
                monkeypatch.setenv(name, value)
        settings = Settings()
        assert settings.engine == "vllm"
        options = settings.vllm_options()
        assert options.distributed_executor_backend == "ray"
        resident = options.extra["additional_config"]["reft"]["resident_bytes"]
        assert resident >= settings.adapter_memory_bytes


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len"])
def test_limits_are_not_those_of_a_cpu(container: dict[str, Any], name: str) -> None:
    head = yaml.safe_load((FOLDER / "head.yml").read_text())["services"]["head"]["environment"]
    pod = {entry["name"]: entry.get("value") for entry in container["env"]}
    for environment in (head, pod):
        given = int(environment[f"REFT_{name.upper()}"])
        assert given > Settings.model_fields[name].default


@pytest.mark.parametrize("version", ["1.28.0", "1.34.0"])
def test_kubernetes_would_take_it(version: str, run_tool: Run) -> None:
    path = FOLDER / "kubernetes.yaml"
    passed(run_tool("kubernetes-validate", "--strict", "-k", version, path))


def test_every_pod_is_a_pipeline_stage(
    objects: dict[str, dict[str, Any]], container: dict[str, Any]
) -> None:
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    replicas = objects["StatefulSet reft-ray"]["spec"]["replicas"]
    assert env["REFT_PIPELINE_PARALLEL_SIZE"] == str(replicas)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert env["REFT_TENSOR_PARALLEL_SIZE"] == str(gpus)


def test_callers_reach_the_head_alone(
    objects: dict[str, dict[str, Any]], container: dict[str, Any]
) -> None:
    labels = objects["StatefulSet reft-ray"]["spec"]["template"]["metadata"]["labels"]
    selector = objects["Service reft-ray"]["spec"]["selector"]
    assert selector == {**labels, "apps.kubernetes.io/pod-index": "0"}
    assert "reft-ray-0.reft-ray-nodes:6379" in container["args"][0]
    nodes = objects["Service reft-ray-nodes"]["spec"]
    assert nodes["publishNotReadyAddresses"] is True
    assert nodes["selector"] == labels


def test_secrets_come_by_reference(container: dict[str, Any]) -> None:
    for entry in container["env"]:
        if any(word in entry["name"] for word in ("KEY", "SECRET", "TOKEN", "DATABASE_URL")):
            assert "secretKeyRef" in entry["valueFrom"], entry["name"]


def test_the_scripts_of_all_are_shell(machine: dict[str, Any], container: dict[str, Any]) -> None:
    for script in (machine["command"][0].replace("$$", "$"), container["args"][0]):
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)
