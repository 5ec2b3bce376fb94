"""The same requests to our server on both engines, answer beside answer: are they the same?

Starts ``reft serve`` twice on the demo model in float32, first on the embedded engine and then on
vLLM, sends both the same requests at once, greedy, and compares every token and its
log-probability. Runs in an environment with vLLM (see ``.ci/vllm``). Writes
``results/vllm-transcript.md``, and the figures to ``results/vllm-transcript.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.provenance import RESULTS, provenance, save
from benchmarks.soak.server import ServerProcess
from server.cli.demo import EXAMPLES

PAGE = RESULTS / "vllm-transcript.md"
BASE = "SmolLM2-135M-Instruct"
_START_TIMEOUT_S = 600
_REQUEST_TIMEOUT_S = 300
_TEXTS = (
    "My parcel was due on Monday and it is still not here.",
    "The soup was cold and the waiter shrugged.",
)
_ENGINES: dict[str, dict[str, object]] = {
    "embedded": {"device": "cpu"},
    "vllm": {"engine": "vllm"},
}


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """What it asks."""
        said: str = self.body.get("input") or self.body["messages"][-1]["content"]
        return said


def main() -> None:
    """Ask both servers, compare, and write what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3, help="of each example's test set")
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    asked = list(requests(args.rows, args.max_tokens))
    answers = {engine: ask_all(engine, asked) for engine in _ENGINES}
    figures = compare(answers["embedded"], answers["vllm"])
    document = {
        **provenance(),
        "vllm": importlib.metadata.version(_distribution()),
        "model": BASE,
        "dtype": "float32",
        **figures,
    }
    save("vllm-transcript", document)
    PAGE.write_text(page(asked, answers["embedded"], answers["vllm"], document))
    print(json.dumps(figures))


def requests(num_rows: int, max_tokens: int) -> Iterator[Asked]:
    """The demo's, of the base model and of every example's adapter, and rows of their test sets."""
    files = sorted(EXAMPLES.glob("*/*.safetensors"))
    for model in (BASE, *(file.stem for file in files)):
        for text in _TEXTS:
            yield _chat(model, text, max_tokens)
    for file in files:
        rows = (file.parent / "test.jsonl").read_text(encoding="utf-8").splitlines()[:num_rows]
        for row in rows:
            yield _chat(file.stem, json.loads(row)["instruction"], max_tokens)
    for text in _TEXTS:
        body = {"model": "sentiment", "input": text, "labels": ["positive", "negative"]}
        yield Asked("/v1/classify", body)


def _chat(model: str, text: str, max_tokens: int) -> Asked:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": True,
    }
    return Asked("/v1/chat/completions", body)


def ask_all(engine: str, asked: list[Asked]) -> list[dict[str, Any]]:
    """What a server on this engine answers to all of them at once."""
    adapters = sorted(map(str, EXAMPLES.glob("*/*.safetensors")))
    settings = {"adapters": os.pathsep.join(adapters), "dtype": "float32", **_ENGINES[engine]}
    with tempfile.TemporaryDirectory(prefix="reft-transcript-") as folder:
        process = ServerProcess("demo", Path(folder), settings)
        try:
            url = process.wait_ready(_START_TIMEOUT_S)
            with (
                httpx.Client(base_url=url, timeout=_REQUEST_TIMEOUT_S) as http,
                ThreadPoolExecutor(len(asked)) as pool,
            ):
                answers = list(pool.map(lambda one: _ask(http, one), asked))
            process.stop()
        finally:
            process.kill()
    return answers


def _ask(http: httpx.Client, asked: Asked) -> dict[str, Any]:
    answer = http.post(asked.path, json=asked.body)
    if answer.status_code != 200:
        raise RuntimeError(f"{asked.path} answered {answer.status_code}: {answer.text}")
    found: dict[str, Any] = answer.json()
    return found


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many answers and tokens there are, how many differ, and the largest difference."""
    pairs = [(_scored(a), _scored(b)) for a, b in zip(ours, theirs, strict=True)]
    tokens = [pair for a, b in pairs for pair in zip(a, b, strict=False)]
    return {
        "num_answers": len(pairs),
        "num_tokens": len(tokens),
        "num_answers_that_differ": sum([t for t, _ in a] != [t for t, _ in b] for a, b in pairs),
        "max_logprob_difference": max(abs(a[1] - b[1]) for a, b in tokens),
    }


def _scored(answer: dict[str, Any]) -> list[tuple[str, float]]:
    """An answer's tokens, or the labels of a text, with the log-probability of each."""
    if "choices" in answer:
        content = answer["choices"][0]["logprobs"]["content"]
        return [(token["token"], token["logprob"]) for token in content]
    return [(each["label"], each["logprob"]) for each in answer["data"][0]["labels"]]


def page(
    asked: list[Asked],
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    document: dict[str, Any],
) -> str:
    """The transcript in Markdown."""
    same = document["num_answers"] - document["num_answers_that_differ"]
    lines = [
        "# One server, two engines",
        "",
        f"`reft serve --engine embedded` and `reft serve --engine vllm` (vLLM {document['vllm']}, "
        f"both on {document['cpu']}), the demo model {BASE} in float32, the adapters of "
        "`examples/`, the same requests sent at once, greedy.",
        "",
        f"**{same} of {document['num_answers']} answers are the same, token for token** "
        f"({document['num_tokens']} tokens; the largest difference of a log-probability is "
        f"{document['max_logprob_difference']:.1e}). Commit {document['commit']}, "
        f"`{document['command']}`.",
        "",
        "| model | asked | embedded | vllm | tokens |",
        "|---|---|---|---|---|",
    ]
    for one, a, b in zip(asked, ours, theirs, strict=True):
        equal = [t for t, _ in _scored(a)] == [t for t, _ in _scored(b)]
        shown = [_cell(_shown(answer)) for answer in (a, b)]
        verdict = f"{len(_scored(a))}, {'the same' if equal else 'DIFFERENT'}"
        lines.append(
            f"| {one.body['model']} | {_cell(one.text)} | {shown[0]} | {shown[1]} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def _shown(answer: dict[str, Any]) -> str:
    if "choices" in answer:
        text: str = answer["choices"][0]["message"]["content"]
        return text
    return ", ".join(f"{label} {logprob:.4f}" for label, logprob in _scored(answer))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()


def _distribution() -> str:
    """The package that holds vLLM here."""
    names = importlib.metadata.packages_distributions()["vllm"]
    return next(name for name in names if name.startswith("vllm"))


if __name__ == "__main__":
    main()
