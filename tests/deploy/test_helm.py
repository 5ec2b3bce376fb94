"""The chart: linted, rendered by helm, and checked against Kubernetes' own schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings
from tests.deploy.conftest import PROJECT, Run, passed

CHART = PROJECT / "deploy/helm/reft-serve"
CASES = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
KUBERNETES = ("1.27.0", "1.34.0")


def _render(run_tool: Run, case: str, *options: str) -> Any:
    return run_tool("helm", "template", "r", CHART, "-f", CHART / f"ci/{case}.yaml", *options)


def _objects(run_tool: Run, case: str, *options: str) -> dict[str, dict[str, Any]]:
    """What is rendered, by kind."""
    rendered = list(yaml.safe_load_all(passed(_render(run_tool, case, *options))))
    return {thing["kind"]: thing for thing in rendered if thing}


@pytest.fixture(params=CASES)
def objects(request: pytest.FixtureRequest, run_tool: Run) -> dict[str, dict[str, Any]]:
    return _objects(run_tool, request.param)


def _pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return dict(objects["Deployment"]["spec"]["template"]["spec"])


def _env(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {entry["name"]: entry for entry in _pod(objects)["containers"][0]["env"]}


@pytest.mark.parametrize("case", CASES)
def test_helm_lint_passes(case: str, run_tool: Run) -> None:
    passed(run_tool("helm", "lint", "--strict", CHART, "-f", CHART / f"ci/{case}.yaml"))


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_would_take_it(case: str, version: str, run_tool: Run, tmp_path: Path) -> None:
    path = tmp_path / "objects.yaml"
    path.write_text(passed(_render(run_tool, case)))
    passed(run_tool("kubernetes-validate", "--strict", "-k", version, path))


def test_everything_is_everything(run_tool: Run) -> None:
    kinds = set(_objects(run_tool, "everything")) | set(_objects(run_tool, "single"))
    assert kinds == {
        "Deployment",
        "HorizontalPodAutoscaler",
        "Ingress",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
    }


def test_the_pod_meets_the_restricted_standard(objects: dict[str, dict[str, Any]]) -> None:
    pod = _pod(objects)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert "hostNetwork" not in pod
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "hostPath" not in json.dumps(pod["volumes"])


def test_kubernetes_waits_longer_than_the_server_drains(
    objects: dict[str, dict[str, Any]],
) -> None:
    pod = _pod(objects)
    before = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = int(_env(objects)["REFT_DRAIN_TIMEOUT_S"]["value"])
    assert pod["terminationGracePeriodSeconds"] >= before + drain + 5


def test_probes_ask_the_right_questions(objects: dict[str, dict[str, Any]]) -> None:
    [container] = _pod(objects)["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    startup = container["startupProbe"]
    assert startup["httpGet"]["path"] == "/healthz"
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 900


def test_secrets_come_by_reference_and_settings_exist(
    objects: dict[str, dict[str, Any]],
) -> None:
    env = _env(objects)
    fields = Settings.model_fields
    for name, entry in env.items():
        if name.startswith("REFT_"):
            assert name.removeprefix("REFT_").lower() in fields, name
        if any(word in name for word in ("KEY", "SECRET", "DATABASE_URL")):
            assert "secretKeyRef" in entry["valueFrom"], name


def test_settings_are_what_the_server_reads(run_tool: Run, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"  # where Helm takes whole numbers for floating ones
    path.write_text(yaml.safe_dump({"settings": {"max_waiting_tokens": 3000000, "drop": 0.25}}))
    env = _env(_objects(run_tool, "single", "-f", str(path)))
    assert env["REFT_MAX_WAITING_TOKENS"]["value"] == "3000000"
    assert env["REFT_DROP"]["value"] == "0.25"


def test_workers_of_several_gpus_get_shared_memory(run_tool: Run) -> None:
    pod = _pod(_objects(run_tool, "vllm"))
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm"
    names = [v["name"] for v in _pod(_objects(run_tool, "single"))["volumes"]]
    assert "shm" not in names


def test_what_is_selected_is_what_runs(objects: dict[str, dict[str, Any]]) -> None:
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    port = objects["Service"]["spec"]["ports"][0]["targetPort"]
    assert port in [p["name"] for p in _pod(objects)["containers"][0]["ports"]]


def test_the_autoscaler_reads_the_queue(run_tool: Run) -> None:
    objects = _objects(run_tool, "everything")
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert "replicas" not in objects["Deployment"]["spec"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "reft_num_requests_waiting"


def test_admin_routes_and_metrics_are_not_on_the_ingress(run_tool: Run) -> None:
    rules = _objects(run_tool, "everything")["Ingress"]["spec"]["rules"]
    assert [path["path"] for rule in rules for path in rule["http"]["paths"]] == ["/v1"]


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("secret.name=", "secret"),
        ("model.name=", "model"),
        ("replicas=2", "storage.shared"),
        ("autoscaling.enabled=true", "storage.shared"),
        ("storage.shared=true", "blobUrl"),
        ("settings.api_key=12345678", "api_key"),
        ("drainTimeoutSeconds=-1", "drainTimeoutSeconds"),
        ("image.digest=latest", "digest"),
        ("no_such_value=1", "no_such_value"),
    ],
)
def test_it_refuses(option: str, complaint: str, run_tool: Run) -> None:
    done = _render(run_tool, "single", "--set", option)
    assert done.returncode != 0
    assert complaint in done.stderr
