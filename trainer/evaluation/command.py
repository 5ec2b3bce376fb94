"""``reft eval``: the terminal around :func:`trainer.evaluation.evaluate.evaluate_model`."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from reft_core.errors import InvalidRequest
from reft_core.loading import Dtype
from reft_core.spec import TemplateSpec
from trainer.data.sources import SPLITS
from trainer.data.templates import PLAIN_TEMPLATE, label_lead
from trainer.evaluation.asking.interface import Asker, Contender
from trainer.evaluation.asking.ledger import Ledger
from trainer.evaluation.asking.url import UrlAsker, remote_contender
from trainer.evaluation.evaluate import EvaluationReport, Options, evaluate_model, settled
from trainer.evaluation.local import BATCH, Template, open_local
from trainer.evaluation.report import to_document, to_table, write_report
from trainer.evaluation.rows import RowSet, merge_references, read_rows, sample, with_labels
from trainer.evaluation.scoring import METRICS
from trainer.progress import BarProgress

ANSWERS_FILE = "answers.jsonl"
URL_BATCH = 8
_EXIT_INTERRUPTED = 130
_OVERLAP = frozenset({"bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"})


@dataclass(frozen=True)
class Asked:
    """The command's options; see ``reft eval --help``."""

    data: str
    """A file, a folder, or a hub's data set."""
    split: str = "test"
    model: str = "demo"
    adapters: tuple[str, ...] = ()
    """Paths, or names at a server."""
    url: str | None = None
    key: str | None = None
    with_base: bool = True
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    extract: str | None = None
    template: str = "auto"
    prompt: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    database: Path | None = None
    limit: int | None = None
    seed: int = 0
    batch: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    timeout_s: float = 600.0
    out: Path | None = None
    as_json: bool = False


@dataclass(frozen=True)
class _Opened:
    """Whoever is to answer."""

    asker: Asker
    contenders: tuple[Contender, ...]
    labels: tuple[str, ...] = ()
    """As the first adapter with any writes them."""
    unmeasured: frozenset[str] = frozenset()
    """Needs of metrics that are left out unless they are named."""


def eval_command(asked: Asked) -> None:
    """Evaluate, print a table, and write a report if a folder is given.

    Ends the process with 130 on Ctrl-C; answers that came until then are kept in the folder.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    console = Console(stderr=True)
    command = shlex.join(["reft", *_shown_arguments(sys.argv[1:])])
    try:
        report = run(asked, console)
    except KeyboardInterrupt:
        kept = f"; answers so far are in {asked.out}" if asked.out else "; nothing was kept"
        console.print(f"interrupted{kept}", markup=False)
        raise SystemExit(_EXIT_INTERRUPTED) from None
    if asked.out is not None:
        write_report(report, asked.out, command)
        console.print(f"report in {asked.out / 'report.md'}", markup=False, soft_wrap=True)
    if asked.as_json:
        sys.stdout.write(json.dumps(to_document(report, command), indent=1) + "\n")
    else:
        Console().print(to_table(report))


def run(asked: Asked, console: Console) -> EvaluationReport:
    """The evaluation that was asked for."""
    if asked.split not in SPLITS:
        raise InvalidRequest.because("split", asked.split, f"one of {', '.join(SPLITS)}")
    rows = read_rows(asked.data, split=asked.split, labels=asked.labels, system=asked.system)
    rows = sample(rows, asked.limit, asked.seed)
    options = Options(asked.metrics, asked.extract, asked.max_tokens, asked.database, asked.seed)
    ledger = Ledger(None if asked.out is None else asked.out / ANSWERS_FILE)
    with _opened(asked, are_labels=bool(rows.labels)) as opened:
        rows = _written(rows, opened, asked.labels)
        options, _ = settled(options, rows)
        if not asked.metrics and rows.rows[0].turns:
            names = [n for n in options.metrics if METRICS[n].needs not in opened.unmeasured]
            options = replace(options, metrics=tuple(names))
        if _OVERLAP & set(options.metrics) and not rows.labels:
            rows = merge_references(rows)
        return evaluate_model(
            opened.asker,
            rows,
            opened.contenders,
            options,
            ledger=ledger,
            progress=BarProgress(console),
        )


@contextmanager
def _opened(asked: Asked, *, are_labels: bool) -> Iterator[_Opened]:
    """Whoever is to answer, on a server or here."""
    template = _template(asked)
    if asked.url is not None:
        own = {"plain": PLAIN_TEMPLATE}.get(template) if isinstance(template, str) else template
        names = [asked.model] * asked.with_base + list(asked.adapters)
        contenders = tuple(remote_contender(asked.url, name, own) for name in names)
        batch = asked.batch or URL_BATCH
        asker = UrlAsker.at(asked.url, asked.key, concurrency=batch, timeout_s=asked.timeout_s)
        # A server that has the template tells no likelihood of a given answer behind it.
        unmeasured = frozenset({"loss"}) if own is None else frozenset()
        with closing(asker):
            yield _Opened(asker, contenders, unmeasured=unmeasured)
        return
    with open_local(
        asked.model,
        [Path(path) for path in asked.adapters],
        dtype=_dtype(asked.dtype),
        device=asked.device,
        template=template,
        are_labels=are_labels,
        batch=asked.batch or BATCH,
        with_base=asked.with_base,
    ) as local:
        # What a head finds likeliest is its answer: one accuracy says all.
        unmeasured = frozenset({"choice"}) if local.is_encoder else frozenset()
        yield _Opened(local.asker, local.contenders, local.labels, unmeasured)


def _written(rows: RowSet, opened: _Opened, given: Sequence[str]) -> RowSet:
    """The rows with their labels written as whoever answers writes them.

    Behind a prompt in plain text a label begins as it does in training.
    """
    if opened.labels or given:
        rows = with_labels(rows, opened.labels or given)
    template = opened.contenders[0].template
    if opened.labels or template is None or not rows.labels:
        return rows
    return with_labels(rows, [label_lead(template) + label for label in rows.labels])


def _template(asked: Asked) -> Template | TemplateSpec:
    if asked.prompt is not None:
        if asked.prompt.count("{content}") != 1:
            expected = "a text that contains '{content}' exactly once"
            raise InvalidRequest.because("prompt", asked.prompt, expected)
        return TemplateSpec(system="{content}\n", user=asked.prompt, assistant="{content}\n")
    if asked.template not in get_args(Template):
        expected = f"one of {', '.join(get_args(Template))}"
        raise InvalidRequest.because("template", asked.template, expected)
    return asked.template  # type: ignore[return-value]  # it was just looked up


def _dtype(name: str) -> Dtype:
    if name not in get_args(Dtype):
        raise InvalidRequest.because("dtype", name, f"one of {', '.join(get_args(Dtype))}")
    return name  # type: ignore[return-value]  # it was just looked up


def _shown_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without the key, which is nobody's business."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        shown.append("***" if hide else f"{name}=***" if name == "--key" and equals else argument)
        hide = argument == "--key"
    return shown
