"""The engine against its peers, its roofline, and itself with adapters. One command, one table.

Regime: one machine, a few cores, the same weights for all, greedy, every answer at full length,
prompts of English text as token ids, prefix caches off. Workloads are in :mod:`workloads`, who
is compared and with which settings in :mod:`peers.contenders`, how repeats interleave in
:mod:`compare`. Every engine runs in a process of its own; loading is not counted. A peer that
cannot be installed or fails is reported as missing, with the reason.

Correctness gate: in float32, the tokens of workload a are those of transformers, ties aside. If
they are not, the command says so and exits with 1.

Peers' environments are made on first use, next to the project or in the folder that
``BENCH_ENVS`` names. With ``--data`` (or ``REFT_DATA``) prompts are cut from the texts of that
folder's ``*.jsonl`` files instead of ``prompts.txt``.

The last line printed is JSON; the whole goes to ``results/engine-full.json`` or
``results/engine-quick.json``; with ``--sections``, ``--workloads`` and ``--peers`` their names
follow. Until the command ends, what was found so far is in ``results/engine-partial.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks import adapter_tax, lora_tax, report, roofline
from benchmarks.compare import Outcome, load_all, run_workload
from benchmarks.gate import gate
from benchmarks.peers.contenders import STATIC, VARIANTS, start
from benchmarks.peers.protocol import ROOT, PeerMissing
from benchmarks.plan import FULL, HEADLINE, QUICK, Plan
from benchmarks.provenance import RESULTS, provenance, save
from benchmarks.workloads import WORKLOADS, data_passages, own_passages, prompts_of
from reft_core.loading import DEMO_MODEL, Dtype, materialise_demo_model

SECTIONS = ("throughput", "tax", "peer-tax", "roofline", "residency", "fanout")
PARTIAL = "engine-partial"


class Bench:
    """One run of the command: what it was asked, and what it has found so far."""

    def __init__(
        self, model: str, threads: int, plan: Plan, passages: list[str], facts: dict[str, Any]
    ) -> None:
        self._model, self._threads, self._plan, self._facts = model, threads, plan, facts
        self._folder = materialise_demo_model() if model == DEMO_MODEL else Path(model)
        tokenizer = AutoTokenizer.from_pretrained(self._folder)
        self._encode: Callable[[str], list[int]] = lambda text: tokenizer(text).input_ids
        self._passages = passages
        self.document: dict[str, Any] = {"errors": {}, "took_s": {}}

    def section(self, name: str, measure: Callable[[], None]) -> None:
        """Run one part. One that breaks is noted and does not take the others along."""
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            measure()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.document["errors"][name] = f"{type(error).__name__}: {error}"
        self.document["took_s"][name] = round(time.monotonic() - started)
        self.save(PARTIAL)

    def save(self, name: str) -> Path:
        """Write what was found so far to a result file of this name, and return where."""
        figures = report.summary(self.document)
        return save(name, {**self._facts, "summary": figures, **self.document})

    def throughput(self, peers: list[str]) -> None:
        """All workloads on all peers, one dtype after the other, and the gate on float32."""
        outcomes: dict[str, Outcome] = {}
        for dtype in self._plan.repeats:
            outcomes[dtype] = Outcome()
            for _ in self._throughput(dtype, peers, outcomes[dtype]):
                self.document["throughput"] = report.throughput(outcomes)
                self.save(PARTIAL)

    def _throughput(self, dtype: Dtype, peers: list[str], outcome: Outcome) -> Iterator[None]:
        """Add each workload in turn to ``outcome``, and the gate's verdicts to the document."""
        with ExitStack() as stack:
            started = []
            for variant in VARIANTS:
                if variant.name not in self._plan.variants[dtype]:
                    continue
                if peers and variant.peer not in peers:
                    continue
                try:
                    worker = start(variant, self._folder, self._model, dtype, self._threads)
                    started.append((variant, stack.enter_context(worker)))
                except PeerMissing as error:
                    outcome.missing[variant.name] = str(error)
            entrants = load_all(started, outcome)
            for name, count in self._plan.repeats[dtype].items():
                print(f"   {dtype} {WORKLOADS[name].title}", flush=True)
                run_workload(
                    WORKLOADS[name],
                    self._prompts(name),
                    entrants,
                    outcome,
                    repeats=count,
                    trials=self._plan.trials,
                )
                yield
            if dtype == "float32" and self._plan.has_gate:
                judges = [e.worker for e in entrants if e.variant.peer == STATIC]
                measured = outcome.measured[HEADLINE]
                prompts = self._prompts(HEADLINE)
                passed, verdicts = gate(judges[0] if judges else None, prompts, measured)
                self.document["gate"] = {"passed": passed, "float32_tokens": verdicts}

    def _prompts(self, workload: str) -> list[list[int]]:
        lengths = WORKLOADS[workload].input_lengths
        return prompts_of(lengths, self._passages, self._encode, seed=ord(workload))

    def tax(self) -> None:
        """What adapters cost this engine."""
        regime = replace(self._plan.tax, model=self._model, threads=self._threads)
        rows = adapter_tax.measure(regime)
        self.document["adapter_tax"] = {
            "regime": asdict(regime),
            **rows,
        }
        for name, row in rows.items():
            print(f"   {name:8s} {row}")

    def peer_tax(self) -> None:
        """What adapters cost the peers."""
        lengths = (lora_tax.INPUT_TOKENS,) * lora_tax.REQUESTS
        prompts = prompts_of(lengths, self._passages, self._encode, seed=0)
        self.document["peer_tax"] = lora_tax.measure(
            self._folder,
            self._model,
            "bfloat16",
            self._threads,
            prompts,
            self._plan.peer_tax_adapters,
            self._plan.peer_tax_repeats,
        )
        for peer, rows in self.document["peer_tax"].items():
            print(f"   {peer}: {rows}")

    def roofline(self) -> None:
        """How near the engine comes to the machine."""
        found = self.document["roofline"] = {}
        for dtype, repeats in self._plan.roofline.items():
            found[dtype] = roofline.measure(self._model, dtype, self._threads, repeats)
            print(f"   {dtype} {found[dtype]}")

    def other(self, name: str) -> None:
        """The summary of a measurement that is a command of its own."""
        command = [sys.executable, "-m", f"benchmarks.{name}", *self._plan.others[name]]
        command += ["--threads", str(self._threads), "--model", self._model]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        lines = run.stdout.strip().splitlines()
        if run.returncode != 0:
            raise RuntimeError(f"exit status {run.returncode}: {lines[-1] if lines else 'silent'}")
        self.document[name] = json.loads(lines[-1])
        print(f"   {lines[-1]}")


def main() -> None:
    """Run the sections that were asked for, print the table, save everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO_MODEL, help="demo, or a folder with a model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="less of everything, in five minutes")
    parser.add_argument("--data", type=Path, default=os.environ.get("REFT_DATA") or None)
    parser.add_argument("--peers", nargs="+", default=[], help="compare only these")
    parser.add_argument("--workloads", nargs="+", default=[], choices=WORKLOADS)
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    options = parser.parse_args()

    disable_progress_bar()
    plan = QUICK if options.quick else FULL
    plan = plan.only(options.workloads) if options.workloads else plan
    passages = data_passages(Path(options.data)) if options.data else own_passages()
    facts = {"model": options.model, "threads": options.threads, "prompts": _source(options.data)}
    facts = {**provenance(), **facts}
    bench = Bench(options.model, options.threads, plan, passages, facts)
    parts: dict[str, Callable[[], None]] = {
        "throughput": lambda: bench.throughput(options.peers),
        "tax": bench.tax,
        "peer-tax": bench.peer_tax,
        "roofline": bench.roofline,
        "residency": lambda: bench.other("residency"),
        "fanout": lambda: bench.other("fanout"),
    }
    wanted = [name for name in plan.expected_s if name in options.sections]
    print("about", ", ".join(f"{plan.expected_s[name]} s of {name}" for name in wanted), flush=True)
    for name in wanted:
        bench.section(name, parts[name])

    document = bench.document
    print(report.table(document))
    path = bench.save(result_name(plan, wanted, options.workloads, options.peers))
    (RESULTS / f"{PARTIAL}.json").unlink(missing_ok=True)
    print("saved to", path)
    figures = report.summary(document)
    failed = "throughput" in wanted and plan.has_gate and not figures["gate"]
    if failed:
        print("correctness gate: FAILED", document.get("gate"))
    for name, error in document["errors"].items():
        print(f"{name} broke: {error}")
    print(json.dumps(figures))
    if failed or document["errors"]:
        raise SystemExit(1)


def result_name(
    plan: Plan, sections: Sequence[str], workloads: Sequence[str], peers: Sequence[str]
) -> str:
    """Of the file that a run goes to once it has ended."""
    parts = [] if set(sections) == set(plan.expected_s) else sections
    return "-".join(["engine", plan.name, *parts, *workloads, *peers])


def _source(data: Path | None) -> str:
    return f"texts of {Path(data).name}" if data else "benchmarks/prompts.txt"


if __name__ == "__main__":
    main()
