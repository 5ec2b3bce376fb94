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
``results/engine-quick.json``, and what ``--peers`` or ``--sections`` cut short, to
``results/engine-partial.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
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
from benchmarks.plan import FULL, QUICK, TAX_COUNTS, Plan
from benchmarks.provenance import provenance, save
from benchmarks.workloads import WORKLOADS, data_passages, own_passages, prompts_of
from reft_core.loading import DEMO_MODEL, Dtype, materialise_demo_model

SECTIONS = ("throughput", "tax", "peer-tax", "roofline", "others")


class Bench:
    """One run of the command: what it was asked, and what it has found so far."""

    def __init__(self, model: str, threads: int, plan: Plan, passages: list[str]) -> None:
        self._model, self._threads, self._plan = model, threads, plan
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

    def throughput(self, peers: list[str]) -> None:
        """All workloads on all peers, one dtype after the other, and the gate on float32."""
        outcomes: dict[str, Outcome] = {}
        for dtype, repeats in self._plan.repeats.items():
            outcomes[dtype] = self._throughput(dtype, repeats, peers)
            self.document["throughput"] = report.throughput(outcomes)

    def _throughput(self, dtype: Dtype, repeats: dict[str, int], peers: list[str]) -> Outcome:
        outcome = Outcome()
        with ExitStack() as stack:
            started = []
            for variant in VARIANTS:
                if (peers and variant.peer not in peers) or not (
                    variant.is_quick or self._plan.all_variants
                ):
                    continue
                try:
                    worker = start(variant, self._folder, self._model, dtype, self._threads)
                    started.append((variant, stack.enter_context(worker)))
                except PeerMissing as error:
                    outcome.missing[variant.name] = str(error)
            entrants = load_all(started, outcome)
            for name, count in repeats.items():
                print(f"   {dtype} {WORKLOADS[name].title}", flush=True)
                run_workload(
                    WORKLOADS[name],
                    self._prompts(name),
                    entrants,
                    outcome,
                    repeats=count,
                    trials=self._plan.trials,
                )
            if dtype == "float32":
                judges = [e.worker for e in entrants if e.variant.peer == STATIC]
                measured = outcome.measured[report.HEADLINE]
                prompts = self._prompts(report.HEADLINE)
                passed, verdicts = gate(judges[0] if judges else None, prompts, measured)
                self.document["gate"] = {"passed": passed, "float32_tokens": verdicts}
        return outcome

    def _prompts(self, workload: str) -> list[list[int]]:
        lengths = WORKLOADS[workload].input_lengths
        return prompts_of(lengths, self._passages, self._encode, seed=ord(workload))

    def tax(self) -> None:
        """What adapters cost this engine."""
        regime = replace(self._plan.tax, model=self._model, threads=self._threads)
        rows = adapter_tax.measure(regime)
        self.document["adapter_tax"] = {
            "regime": asdict(regime),
            **{f"K={k}": row for k, row in rows.items()},
        }
        for k, row in rows.items():
            print(f"   K={k:<4} {row}")

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
            TAX_COUNTS,
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
        """The summary of a measurement that is a command of its own; None where there is none."""
        if importlib.util.find_spec(f"benchmarks.{name}") is None:
            self.document[name] = None
            return
        command = [sys.executable, "-m", f"benchmarks.{name}", "--threads", str(self._threads)]
        run = subprocess.run(
            [*command, "--model", self._model], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
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
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    options = parser.parse_args()

    disable_progress_bar()
    plan = QUICK if options.quick else FULL
    passages = data_passages(Path(options.data)) if options.data else own_passages()
    bench = Bench(options.model, options.threads, plan, passages)
    document = bench.document
    if "throughput" in options.sections:
        bench.section("throughput", lambda: bench.throughput(options.peers))
    if "tax" in options.sections:
        bench.section("tax", bench.tax)
    if "peer-tax" in options.sections and plan.peer_tax_repeats:
        bench.section("peer-tax", bench.peer_tax)
    if "roofline" in options.sections:
        bench.section("roofline", bench.roofline)
    if "others" in options.sections and plan.others:
        bench.section("residency", lambda: bench.other("residency"))
        bench.section("fanout", lambda: bench.other("fanout"))

    print(report.table(document))
    figures = report.summary(document)
    facts = {"model": options.model, "threads": options.threads, "prompts": _source(options.data)}
    is_whole = not options.peers and set(options.sections) == set(SECTIONS)
    name = f"engine-{plan.name}" if is_whole else "engine-partial"
    path = save(name, {**provenance(), **facts, "summary": figures, **document})
    print("saved to", path)
    failed = "throughput" in options.sections and not figures["gate"]
    if failed:
        print("correctness gate: FAILED", document.get("gate"))
    for name, error in document["errors"].items():
        print(f"{name} broke: {error}")
    print(json.dumps(figures))
    if failed or document["errors"]:
        raise SystemExit(1)


def _source(data: Path | None) -> str:
    return f"texts of {Path(data).name}" if data else "benchmarks/prompts.txt"


if __name__ == "__main__":
    main()
