"""``reft bench``: how fast a running OpenAI-compatible server answers, ours or another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from reft_core.errors import ReftError
from server.cli.errors import console, one_line_errors
from server.cli.options import AsJson, Key, Url
from server.cli.text import print_json, safe
from server.client.address import DEFAULT_URL, api_url

_INTERRUPTED = 130


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Model or adapter; repeatable: in turn. Default: first"),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="How many")] = 64,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-j", min=1, max=4096, help="How many at a time")
    ] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer")] = 64,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="One a line, or .jsonl with prompt, instruction or messages. Default: own ones"
        ),
    ] = None,
    completions: Annotated[
        bool, typer.Option("--completions", help="Ask /v1/completions, not the chat API")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Always --max-tokens; not every server knows it")
    ] = False,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before those that count")] = 2,
    url: Url = DEFAULT_URL,
    key: Key = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds without a byte")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Measure a server: tokens/s, time to the first token, time between tokens.

    Every request streams; a gap is the time from one event with text to the next. Errors are
    counted, shown, and make the exit status 1.
    """
    with one_line_errors():
        from server.client.bench_report import ALL, document, table
        from server.client.connection import Client, options
        from server.client.measure import Seen, measure
        from server.client.workload import Shape, bodies, read_prompts

        given = None if prompts is None else read_prompts(prompts)
        models = tuple(model or ())
        if not models:
            with Client(url, key, timeout) as client:
                cards = client.models()
            if not cards:
                raise ReftError("model: the server lists none; name one with --model")
            models = (cards[0]["id"],)
        shape = Shape(models, requests, max_tokens, temperature, ignore_eos, completions)
        connection = options(api_url(url), key, timeout)
        if warmup:
            first = Shape(models, warmup, max_tokens, temperature, ignore_eos, completions)
            warm = measure(connection, shape.path, bodies(first, given), concurrency, _nothing)
            if warm.was_stopped:
                raise typer.Exit(_INTERRUPTED)
            # All wrong at the start is a wrong address, key or model, and no measurement.
            if warm.seen and all(seen.error for seen in warm.seen):
                raise ReftError(str(warm.seen[0].error))
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress:
            task = progress.add_task("requests", total=requests)

            def on_end(seen: Seen) -> None:
                progress.advance(task)

            run = measure(connection, shape.path, bodies(shape, given), concurrency, on_end)
        asked = {
            "url": url,
            "path": shape.path,
            "concurrency": concurrency,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "ignore_eos": ignore_eos,
            "prompts": "own" if prompts is None else str(prompts),
        }
        found = document(run, models, asked)
        if as_json:
            print_json(found)
        else:
            Console().print(table(found))
        for message, count in found[ALL]["error_messages"].items():
            console.print(f"[red]{count} × {safe(message)}[/]", soft_wrap=True)
        if run.was_stopped:
            console.print("stopped; the figures are of what had ended")
            raise typer.Exit(_INTERRUPTED)
        if found[ALL]["errors"]:
            raise typer.Exit(1)


def _nothing(seen: object) -> None:
    """What is done about a request that only warms up."""
