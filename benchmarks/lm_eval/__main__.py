"""``python -m benchmarks.lm_eval --data FOLDER``: see the package's docstring.

The exit status is 1 if a log-likelihood differs from transformers' own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.lm_eval.harness import Run, ask, command_of, write_tasks
from benchmarks.lm_eval.truth import compare
from benchmarks.peers.environments import LM_EVAL, python_of
from benchmarks.peers.protocol import ROOT
from benchmarks.provenance import provenance, save
from benchmarks.soak.server import ServerProcess
from reft_core.adapter import read_adapter
from reft_core.loading import load_model
from reft_core.threads import run_in_own_thread

TOLERANCE = 1e-3
_SHOWN_URL = "http://127.0.0.1:8000"
_ADAPTER = ROOT / "examples" / "sentiment" / "sentiment.safetensors"
_SCORING = ("reft_sst2_score", "reft_arc_easy_score")


def main() -> int:
    """Run, print and save; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with sst2/test.jsonl and ARC-Easy/test.jsonl",
    )
    parser.add_argument("--model", default="demo", help="demo, hub id or folder")
    parser.add_argument("--adapter", type=Path, default=_ADAPTER, help="asked beside the base")
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--no-save", action="store_true", help="only print")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reft-lm-eval-") as made:
        found = measure(given.model, given.adapter, given.data, given.limit, Path(made))
    # Where the data lies is this machine's own business.
    command = f"python -m benchmarks.lm_eval --data DATA --limit {given.limit}"
    if given.model != "demo":
        command += f" --model {given.model}"
    document = {**provenance(), "command": command, **found}
    if not given.no_save:
        print(f"saved to {save('lm-eval', document)}")
    print(json.dumps(document))
    agreement = found["agreement"]
    return int(agreement["max_difference"] > TOLERANCE or not agreement["num_scores"])


def measure(
    model: str, adapter: Path | None, data: Path, limit: int, folder: Path, max_len: int = 2048
) -> dict[str, Any]:
    """What the harness finds, and how far its scores are from the truth.

    ``folder`` is empty and this function's own. ``adapter`` None asks the base model alone.
    """
    python = python_of(LM_EVAL)
    tasks = write_tasks(folder, data)
    # In a thread that ends: the parent keeps no pool of workers beside the server's.
    loaded = run_in_own_thread(lambda: load_model(model))
    tokenizer = folder / "tokenizer"
    loaded.tokenizer.save_pretrained(tokenizer)
    base = loaded.description.name
    runs = [
        Run("local-completions", base, (*_SCORING, "reft_sst2_write")),
        Run("local-chat-completions", base, ("reft_sst2_answer",)),
    ]
    settings: dict[str, object] = {"dtype": "float32", "device": "cpu", "max_model_len": max_len}
    if adapter is not None:
        name = read_adapter(adapter).spec.name
        runs.append(Run("local-chat-completions", name, ("reft_sst2_answer",)))
        settings["adapters"] = adapter.resolve()
    (folder / "server").mkdir()
    process = ServerProcess(model, folder / "server", settings)
    scored, reports = [], []
    try:
        url = process.wait_ready()
        for number, run in enumerate(runs):
            command = command_of(run, url, tokenizer, max_len, limit)
            found = ask(python, command, tasks, folder / f"run-{number}")
            scored += found.scored
            as_shown = command_of(run, _SHOWN_URL, Path("TOKENIZER"), max_len, limit)
            reports.append(
                {
                    "client": run.client,
                    "model": run.model,
                    "command": shlex.join(["python", *as_shown, "--include_path", "TASKS"]),
                    "table": found.table,
                    "num_items": found.num_items,
                    "metrics": found.metrics,
                }
            )
            print(f"{run.client}, {run.model}: {found.metrics}", flush=True)
        if process.stop():
            raise RuntimeError(f"the server did not end in order:\n{process.tail()}")
    finally:
        process.kill()
    return {
        "model": base,
        "lm_eval": _version(python),
        "limit": limit,
        "runs": reports,
        "agreement": {**asdict(compare(loaded, scored)), "tolerance": TOLERANCE},
    }


def _version(python: Path) -> str:
    """The harness's release."""
    code = "import importlib.metadata as m; print(m.version('lm-eval'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
