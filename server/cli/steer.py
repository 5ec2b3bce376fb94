"""``reft adapter steer``: a steering vector from two sets of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from reft_core.errors import InvalidRequest
from server.cli.errors import one_line_errors
from server.cli.files import check_free, layer_numbers, write
from server.cli.options import Force


def steer(
    positive: Annotated[
        Path, typer.Option(help="Text file, a prompt a line: what answers are to be like")
    ],
    negative: Annotated[Path, typer.Option(help="The same: what they are not to be like")],
    layers: Annotated[str, typer.Option(help="'all', or layer numbers from 0: 10,12")],
    out: Annotated[Path, typer.Option(help="The adapter file to write")],
    model: Annotated[str, typer.Option(help="Hub id, folder, or 'demo'")] = "demo",
    name: Annotated[str | None, typer.Option(help="Its name; default: that of --out")] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Default: block_output; repeatable")
    ] = None,
    read: Annotated[
        str, typer.Option(help="Position rule: where the prompts' states are read")
    ] = "l1",
    positions: Annotated[
        str, typer.Option(help="Position rule: where requests' prompts are edited")
    ] = "prompt",
    phase: Annotated[
        str, typer.Option(help="'all' edits generated tokens too; or 'prompt'")
    ] = "prompt",
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the lines as they are, without a chat template")
    ] = False,
    force: Force = False,
) -> None:
    """Write an adapter that adds the difference of two sets of prompts' mean states.

    Its vector is scaled by a request's strength, -1 for the opposite. Nothing is trained.
    """
    with one_line_errors():
        from reft_core.loading import load_model
        from reft_core.steer import steer as steer_to_file
        from reft_core.templates import encode_chat, encode_text

        check_free(out, force)
        texts = {"positive": _lines("positive", positive), "negative": _lines("negative", negative)}
        loaded = load_model(model)
        prompts = {
            side: [
                encode_text(loaded.tokenizer, line)
                if raw
                else encode_chat(loaded.tokenizer, [{"role": "user", "content": line}])
                for line in lines
            ]
            for side, lines in texts.items()
        }
        data = steer_to_file(
            loaded,
            prompts["positive"],
            prompts["negative"],
            name=name or out.stem,
            layers=_layers(layers, loaded.description.num_layers),
            sites=tuple(site) if site else None,
            read=read,
            positions=positions,
            phase=_phase(phase),
        )
        write(out, data)


def _lines(option: str, path: Path) -> list[str]:
    """The lines of a file that hold anything."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest.because(option, str(path), f"a text file ({error})") from None
    return [line for line in text.splitlines() if line.strip()]


def _layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that ``--layers`` names; which of them there are is checked elsewhere."""
    if text == "all":
        return tuple(range(num_layers))
    return layer_numbers(text, "'all', or numbers such as 10,12")


def _phase(text: str) -> Literal["prompt", "all"]:
    if text in ("prompt", "all"):
        return text  # type: ignore[return-value]  # mypy does not narrow by membership
    raise InvalidRequest.because("phase", text, "'prompt' or 'all'")
