"""``reft eval``: how well a model and its adapters answer the rows of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.errors import one_line_errors
from server.cli.options import Key


def evaluate(
    data: Annotated[str, typer.Option(help="File, folder of splits, or a data set's hub name")],
    split: Annotated[
        str, typer.Option(help="Of a folder or a data set: test, valid or train")
    ] = "test",
    model: Annotated[str, typer.Option(help="Hub id, folder or 'demo'; a name at --url")] = "demo",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="File or folder; a name at --url; repeatable"),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask this OpenAI-compatible server, not an engine here")
    ] = None,
    key: Key = None,
    base: Annotated[bool, typer.Option(help="Ask the base model too, and compare with it")] = True,
    metrics: Annotated[
        str | None, typer.Option(help="Names with commas; default: those that fit the rows")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Names with commas, in order; default: labels.json, the rows")
    ] = None,
    extract: Annotated[
        str | None, typer.Option(help="How an answer is read; default: as fits the rows")
    ] = None,
    template: Annotated[
        str, typer.Option(help="auto: the adapter's, else the model's; chat; or plain")
    ] = "auto",
    prompt: Annotated[
        str | None, typer.Option(help="The question in these words: '{content}\\nAnswer:'")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of every row")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of a greedy answer")] = None,
    database: Annotated[
        Path | None, typer.Option(help="SQLite file that generated queries run on, read-only")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows, drawn by --seed")] = None,
    seed: Annotated[int, typer.Option(help="Of the rows drawn and of the intervals")] = 0,
    batch: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Requests at a time; 32, at --url 8")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda")] = "cpu",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a server may be silent")] = 600.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report, and for answers to go on from; default: none"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report on standard output")] = False,
) -> None:
    """Measure a base model and adapters, side by side, on the same rows.

    Metrics follow from what the rows are, with 95 % intervals and paired differences. With --out,
    a run that was interrupted goes on where it was.
    """
    with one_line_errors():
        from trainer.evaluation.command import Asked, eval_command

        eval_command(
            Asked(
                data=data,
                split=split,
                model=model,
                adapters=tuple(adapter or ()),
                url=url,
                key=key,
                with_base=base,
                metrics=_names(metrics),
                labels=_names(labels),
                extract=extract,
                template=template,
                prompt=prompt,
                system=system,
                max_tokens=max_tokens,
                database=database,
                limit=limit,
                seed=seed,
                batch=batch,
                dtype=dtype,
                device=device,
                timeout_s=timeout,
                out=out,
                as_json=as_json,
            )
        )


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
