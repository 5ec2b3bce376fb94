"""lm-eval as a process of its own, and what it wrote down."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Run:
    """One invocation of the harness."""

    client: str
    """Its name for the way it asks: local-completions or local-chat-completions."""
    model: str
    """What the server is asked for."""
    tasks: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        """Whether it sends messages, and leaves templates and tokens to the server."""
        return self.client == "local-chat-completions"


@dataclass(frozen=True)
class Scored:
    """A continuation as the harness scored it."""

    context: str
    continuation: str
    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Finished:
    """What a run found."""

    metrics: dict[str, dict[str, float]]
    """By task, then by metric."""
    num_items: dict[str, int]
    scored: list[Scored]
    table: list[str]
    """What it printed at its end, in Markdown."""


def write_tasks(folder: Path, data: Path) -> Path:
    """The tasks over the data in ``data``, as the harness reads them; returns their folder."""
    made = folder / "tasks"
    made.mkdir()
    for template in TASKS.glob("*.yaml"):
        text = template.read_text().replace("DATA/", f"{data.resolve()}/")
        (made / template.name).write_text(text)
    return made


def command_of(run: Run, url: str, tokenizer: Path, max_len: int, limit: int) -> list[str]:
    """The arguments after the interpreter, but for folders."""
    path = "chat/completions" if run.is_chat else "completions"
    facts = {
        "model": run.model,
        "base_url": f"{url}/v1/{path}",
        "num_concurrent": 4,
        "max_retries": 3,
    }
    if not run.is_chat:
        facts |= {
            "tokenizer_backend": "huggingface",
            "tokenizer": tokenizer,
            "max_length": max_len,
        }
    arguments = ",".join(f"{name}={value}" for name, value in facts.items())
    return [
        *("-m", "lm_eval", "run", "--model", run.client, "--model_args", arguments),
        *("--tasks", ",".join(run.tasks), "--limit", str(limit)),
        *(("--apply_chat_template",) if run.is_chat else ("--batch_size", "2")),
    ]


def ask(python: Path, command: Sequence[str], tasks: Path, folder: Path) -> Finished:
    """Run the harness, with all it writes below ``folder``. Raises :class:`RuntimeError`."""
    out = folder / "out"
    log = folder / "log"
    folder.mkdir()
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "unused",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("wb") as file:
        done = subprocess.run(
            [
                *(str(python), *command, "--include_path", str(tasks)),
                *("--output_path", str(out), "--log_samples"),
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            timeout=_TIMEOUT_S,
            check=False,
        )
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"lm-eval ended with {done.returncode}:\n{end}")
    return _read(out, log)


def _read(out: Path, log: Path) -> Finished:
    """What the harness wrote into its output folder, and printed."""
    (path,) = out.rglob("results_*.json")
    document = json.loads(path.read_text())
    metrics = {
        task: {
            name.removesuffix(",none"): value
            for name, value in found.items()
            if isinstance(value, float)
        }
        for task, found in document["results"].items()
    }
    scored: list[Scored] = []
    num_items = {}
    for task in metrics:
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        num_items[task] = len(rows)
        for row in rows:
            scored += _scored_in(row)
    printed = log.read_text(errors="replace").splitlines()
    table = [line for line in printed if line.startswith("|")]
    return Finished(metrics, num_items, scored, table)


def _scored_in(row: dict[str, Any]) -> Iterator[Scored]:
    """The continuations scored for one item; none if it was to write."""
    for arguments, outcome in zip(row["arguments"].values(), row["resps"], strict=True):
        if isinstance(outcome[0], list):
            logprob, is_greedy = outcome[0]
            yield Scored(
                arguments["arg_0"],
                arguments["arg_1"],
                float(logprob),
                str(is_greedy) == "True",
            )
