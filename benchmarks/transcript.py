"""docs/clients.md, written from a run: what clients that others wrote print.

Starts the demo's server in a process of its own, runs the parts of ``examples/openai_client.py``
and the README's curl lines against it, and adds what lm-eval printed when
``results/lm-eval.json`` was measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import openai

from benchmarks.peers.protocol import ROOT
from benchmarks.provenance import RESULTS
from benchmarks.soak.server import ServerProcess
from server.cli.demo import EXAMPLES

ADDRESS = "http://127.0.0.1:8000"
PAGE = ROOT / "docs" / "clients.md"
_INTRODUCTION = Path(__file__).parent / "transcript.md"


def main() -> None:
    """Run everything and write the page."""
    adapters = sorted(EXAMPLES.glob("*/*.safetensors"))
    settings = {
        "adapters": ":".join(map(str, adapters)),
        "allow_inline_adapters": True,
        "dtype": "float32",
        "device": "cpu",
    }
    with tempfile.TemporaryDirectory(prefix="reft-transcript-") as folder:
        process = ServerProcess("demo", Path(folder), settings)
        try:
            url = process.wait_ready()
            parts = {"OPENAI": openai_part(url), "CURL": curl_part(url), "LM_EVAL": lm_eval_part()}
            process.stop()
        finally:
            process.kill()
    page = _INTRODUCTION.read_text().replace("OPENAI_VERSION", openai.__version__)
    for name, text in parts.items():
        page = page.replace(f"<!-- {name} -->\n", text)
    PAGE.write_text(page)
    print(f"written to {PAGE.relative_to(ROOT)}")


def cells(source: str) -> list[tuple[str, str]]:
    """The parts of a script: title and code, in order."""
    pieces = re.split(r"^# %% (.*)\n", source, flags=re.MULTILINE)[1:]
    return [
        (title, code.strip("\n")) for title, code in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def openai_part(url: str) -> str:
    """The example's parts and what each printed, run one after the other."""
    namespace: dict[str, Any] = {"__name__": "transcript"}
    found = []
    for title, code in cells((EXAMPLES / "openai_client.py").read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT):
            exec(compile(code.replace(ADDRESS, url), title, "exec", dont_inherit=True), namespace)
        output = printed.getvalue().replace(url, ADDRESS)
        found.append(f"### {title}\n\n```python\n{code}\n```\n\n{_block(output)}")
    return "\n".join(found)


def curl_part(url: str) -> str:
    """The README's lines that ask a running server, and the answers."""
    found = []
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for block in blocks:
        if "curl -" not in block or ADDRESS not in block:
            continue
        script = ["bash", "-euc", block.replace(ADDRESS, url)]
        done = subprocess.run(script, capture_output=True, text=True, check=True)
        found.append(f"```sh\n{block}```\n\n{_block(done.stdout)}")
    return "\n".join(found)


def lm_eval_part() -> str:
    """What the harness printed, by run, and how far its scores are from transformers'."""
    result = json.loads((RESULTS / "lm-eval.json").read_text())
    found = []
    for run in result["runs"]:
        table = "\n".join(run["table"])
        found.append(f"```sh\n{run['command']}\n```\n\n{table}\n")
    agreement = result["agreement"]
    found.append(
        f"Of {agreement['num_scores']} log-likelihoods the one furthest from transformers' own "
        f"differs by {agreement['max_difference']:.1e}; on {agreement['num_greedy_differs']} they "
        f"disagree whether greedy decoding writes it. ({result['model']} in float32, "
        f"lm-eval {result['lm_eval']}, at most {result['limit']} items a task, commit "
        f"{result['commit']}; `make lm-eval`, benchmarks/results/lm-eval.json.)\n"
    )
    return "\n".join(found)


def _block(output: str) -> str:
    """Printed lines as a block."""
    return f"```text\n{output.rstrip()}\n```\n"


if __name__ == "__main__":
    main()
