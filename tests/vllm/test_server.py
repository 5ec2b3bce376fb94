"""vLLM's own OpenAI server with two data-parallel ranks, and adapters from a folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.factories import random_adapter_bytes, random_prompt
from tests.vllm.tiny import BLOCK_TOKENS, Job, TinyWorld, mixed_jobs

START_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, world: TinyWorld) -> Path:
    """The place that the server takes adapters from, under whatever names."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, data in enumerate(world.files.values()):
        (folder / f"{number}.safetensors").write_bytes(data)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def server(world: TinyWorld, folder: Path) -> Iterator[httpx.Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"reft": {"spool": world.spool, "adapters": [str(folder)], "look_interval_s": 0}}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", world.model_path, "--served-model-name", "base", "--dtype", "float32"]
    command += ["--data-parallel-size", "2", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--max-model-len", "512", "--max-num-batched-tokens", "17", "--max-num-seqs", "8"]
    command += ["--block-size", str(BLOCK_TOKENS), "--enforce-eager", "--enable-scale-out"]
    command += ["--additional-config", json.dumps(settings)]
    environment = os.environ | {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
            _await_start(client, process)
            yield client
        finally:
            process.terminate()


def _await_start(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start in {START_S} s")


def complete(server: httpx.Client, job: Job, **body: Any) -> httpx.Response:
    """The answer to a job's prompt, greedy."""
    fixed = {
        "prompt": list(job.prompt),
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return server.post("/v1/completions", json={"model": "base", **fixed, **body})


def tokens_of(answer: httpx.Response) -> list[int]:
    """The token ids of an answer."""
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def test_mixed_requests_over_two_ranks(server: httpx.Client, world: TinyWorld) -> None:
    jobs = mixed_jobs(2)

    def answer(job: Job) -> list[int]:
        document = json.dumps(world.extra_args(job).get("reft"))
        xargs = {"vllm_xargs": {"reft": document}} if job.stack else {}
        return tokens_of(complete(server, job, **xargs))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answer, jobs))
    assert found == [world.expected(job) for job in jobs]
    assert ranks_used(server) == {"0", "1"}


def test_adapters_are_models(server: httpx.Client, world: TinyWorld) -> None:
    cards = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    assert cards.keys() >= {"base", *world.files}
    assert cards["last"]["root"] == world.adapter("last").digest
    assert cards["last"]["parent"] == "base"
    for name in world.files:
        job = Job(random_prompt(37, seed=1), ((name, 1.0),))
        assert tokens_of(complete(server, job, model=name)) == world.expected(job)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nobody", "a name of one adapter"),
        ("0" * 64, "a known digest"),
        ("{", "reft: "),
        ('{"adapters": [{"name": "last", "strength": 1e9}]}', "strength: "),
    ],
)
def test_bad_adapters_get_a_400(server: httpx.Client, asked: str, message: str) -> None:
    answer = complete(server, Job(random_prompt(5)), vllm_xargs={"reft": asked})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_bad_models_get_a_400_or_404(server: httpx.Client) -> None:
    job = Job(random_prompt(5))
    assert complete(server, job, model="nobody").status_code == 404
    for more in ({"use_beam_search": True, "n": 2}, {"vllm_xargs": {"reft": "untied"}}):
        answer = complete(server, job, model="last", **more)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in ("use_beam_search", "vllm_xargs.reft")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "w5"}]]}),
        ("/inference/v1/generate", {"token_ids": [5, 6], "sampling_params": {"max_tokens": 1}}),
        (
            "/generative_scoring",
            {"query": "w5", "items": ["w6"], "label_token_ids": [5, 6], "item_first": False},
        ),
    ],
)
def test_routes_without_adapters_do_not_answer_as_the_base_model(
    server: httpx.Client, route: str, body: dict[str, Any]
) -> None:
    answer = server.post(route, json={"model": "last", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "model"


def test_promotion_and_deletion_while_requests_run(
    server: httpx.Client, world: TinyWorld, folder: Path
) -> None:
    versions = {
        f"v{seed}": random_adapter_bytes(
            world.description, seed=seed, size=2.0, name="news", positions="f4+l9"
        )
        for seed in (50, 51)
    }
    there = replace(world, files={**world.files, **versions})
    jobs = {v: Job(random_prompt(300, seed=3), ((v, 1.0),), 60) for v in versions}
    path = folder / "news.safetensors"
    # Longer than all that happens meanwhile.
    background = [Job(random_prompt(80, seed=s), (("last", 1.0),), 400) for s in range(4)]
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(complete, server, job, model="last") for job in background]
        found = {}
        for version, data in versions.items():
            path.with_suffix(".new").write_bytes(data)
            path.with_suffix(".new").rename(path)
            assert not any(other.done() for other in others), "requests run during the swap"
            found[version] = [
                pool.submit(complete, server, jobs[version], model="news") for _ in range(2)
            ]
            found[version][0].result()
        path.unlink()
        gone = complete(server, jobs["v51"], model="news")
        assert not any(other.done() for other in others), "requests run during the deletion"
        wanted = {version: there.expected(job) for version, job in jobs.items()}
        for version, futures in found.items():
            assert [tokens_of(future.result()) for future in futures] == [wanted[version]] * 2
        for job, other in zip(background, others, strict=True):
            assert tokens_of(other.result()) == world.expected(job)
    assert gone.status_code == 404
    digest = there.adapter("v51").digest
    late = complete(server, jobs["v51"], vllm_xargs={"reft": digest})
    assert late.status_code == 400


def ranks_used(server: httpx.Client) -> set[str]:
    """The data-parallel ranks that have finished requests."""
    lines = server.get("/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("vllm:request_success_total{")]
    return {line.split('engine="')[1][0] for line in counts if float(line.split()[-1])}
