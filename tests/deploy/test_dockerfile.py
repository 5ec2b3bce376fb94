"""The Dockerfile: what hadolint says, and what we promise of the image."""

from __future__ import annotations

import ast
import re
import tomllib
from typing import Any

import pytest

from deploy.docker.constrain import shipped_extras, versions
from deploy.docker.context import Context
from deploy.docker.dockerfile import Dockerfile, Instruction, read, substitute
from tests.deploy.conftest import PROJECT, Run, passed


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    return read(PROJECT / "Dockerfile")


def _last(file: Dockerfile, target: str, name: str) -> Instruction:
    """The instruction that decides: the last of its name on the way up to ``target``."""
    return [i for stage in file.lineage(target) for i in stage.instructions if i.name == name][-1]


def test_hadolint_has_no_complaint(run_tool: Run) -> None:
    assert passed(run_tool("hadolint", "--failure-threshold", "style", "Dockerfile")) == ""


@pytest.mark.parametrize("target", ["cpu", "cuda", "vllm"])
def test_the_image_runs_unprivileged_and_says_how_it_is(
    dockerfile: Dockerfile, target: str
) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", _last(dockerfile, target, "USER").value)
    assert _last(dockerfile, target, "STOPSIGNAL").value == "SIGTERM"
    assert "/opt/healthcheck.py" in _last(dockerfile, target, "HEALTHCHECK").value
    assert _last(dockerfile, target, "ENTRYPOINT").words == ["tini", "--", "reft"]
    assert _last(dockerfile, target, "CMD").words == ["serve"]
    labels = _last(dockerfile, target, "LABEL").pairs
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_default_target_is_for_a_cpu(dockerfile: Dockerfile) -> None:
    assert list(dockerfile.stages)[-1] == "cpu"
    needed = {stage.name for stage in dockerfile.needed("cpu")}
    assert "torch-cuda" not in needed


def test_neither_pip_nor_a_build_stage_is_below_the_image(dockerfile: Dockerfile) -> None:
    for target in ("cpu", "cuda", "vllm"):
        assert [stage.name for stage in dockerfile.lineage(target)][:2] == ["base", "runtime"]


def test_a_change_of_source_leaves_the_dependencies_cached(dockerfile: Dockerfile) -> None:
    copied = [
        source
        for stage in dockerfile.lineage("dependencies-cpu")
        for step in stage.instructions
        if step.name == "COPY"
        for source in step.words[:-1]
    ]
    assert sorted(copied) == [
        "LICENSE",
        "deploy/docker/constraints.txt",
        "pyproject.toml",
        "reft_core/__init__.py",
    ]


def test_all_that_is_copied_is_in_the_context_and_little_else(dockerfile: Dockerfile) -> None:
    context = Context(PROJECT)
    taken = {
        name
        for stage in dockerfile.stages.values()
        for step in stage.instructions
        if step.name == "COPY" and "from" not in step.flags
        for source in step.words[:-1]
        for name in context.matching(source)
    }
    assert set(context.files) == taken
    assert "reft_core/native/kernels.cpp" in taken
    assert not [name for name in taken if name.endswith(".pyc") or name.startswith("tests/")]


def test_no_secret_is_in_the_image(dockerfile: Dockerfile) -> None:
    for stage in dockerfile.stages.values():
        for step in stage.instructions:
            if step.name in ("ARG", "ENV"):
                assert not re.search(r"KEY|SECRET|PASSWORD|TOKEN", " ".join(step.pairs))


def test_every_dependency_has_a_version(dockerfile: Dockerfile) -> None:
    held = _constraints()
    project = _project()
    wanted = [*project["dependencies"]]
    for extra in shipped_extras():
        wanted += project["optional-dependencies"][extra]
    names = {re.split(r"[\[<>=!~; ]", need)[0].lower().replace("_", "-") for need in wanted}
    missing = names - held - {"torch"}
    assert not missing, "run: python -m deploy.docker.constrain > deploy/docker/constraints.txt"
    cuda = _last(dockerfile, "dependencies-cuda", "ARG").pairs["EXTRAS"]
    assert cuda.split(",") == shipped_extras()


def test_nothing_else_has_one() -> None:
    held, project = _constraints(), _project()
    assert "jinja2" in held, "transformers' chat templates need it without saying so"
    assert project["name"] not in held | versions().keys()
    for extra in project["optional-dependencies"].keys() - set(shipped_extras()):
        for need in project["optional-dependencies"][extra]:
            own = re.split(r"[\[<>=!~; ]", need)[0].lower()
            assert own not in held or own in versions(), (extra, own)


def _constraints() -> set[str]:
    """The names that are pinned."""
    lines = (PROJECT / "deploy/docker/constraints.txt").read_text().splitlines()
    return {line.partition("==")[0] for line in lines if not line.startswith("#")}


def _project() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def test_the_image_has_the_pytorch_that_we_develop_with(dockerfile: Dockerfile) -> None:
    install = (PROJECT / "scripts/install").read_text()
    developed = re.search(r'TORCH_CPU="torch==([\d.]+)"', install)
    assert developed is not None
    for stage in ("torch-cpu", "torch-cuda"):
        arguments = [s for s in dockerfile.stages[stage].instructions if s.name == "ARG"]
        assert arguments[0].pairs["TORCH_VERSION"] == developed[1]


def test_the_health_check_needs_nothing_but_python() -> None:
    tree = ast.parse((PROJECT / "deploy/docker/healthcheck.py").read_text())
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported == {"http.client", "os", "sys"}


def test_variables_are_replaced_as_docker_does() -> None:
    known = {"A": "1", "EMPTY": ""}
    assert substitute("$A-${A}-${B:-x}-${EMPTY:-y}-$B", known) == "1-1-x-y-"


def test_what_the_rehearsal_does_not_know_is_refused(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "Dockerfile"
    path.write_text("FROM debian:bookworm-slim AS base\nADD a b\n")
    with pytest.raises(ValueError, match="line 2: 'ADD a b'"):
        read(path)
