"""``reft adapter inspect`` and ``describe``: what an adapter file says and does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from server.cli.errors import one_line_errors
from server.cli.methods import describe_text
from server.cli.prompt import drawn_tokens, encode, load_tokenizer, texts
from server.cli.text import printable, ranges, safe

if TYPE_CHECKING:
    from reft_core.adapter import Adapter, EditKey
    from reft_core.sites import ModelDescription
    from reft_core.spec import HeadSpec
    from server.cli.norms import DeltaNorm

_MOST_SHOWN = 8


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file")],
    base: Annotated[
        str | None, typer.Option(help="Its base model: folder, hub id or 'demo'; adds % of it")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Show which of its tokens are edited, and how far; needs --base"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the prompt as it is, not as a user's message")
    ] = False,
) -> None:
    """Show what an adapter file says and does. Checks all of it; runs none of it.

    With a prompt, the base model reads it, if it can be loaded, to measure Δ on its states.
    """
    with one_line_errors():
        from reft_core.adapter import read_adapter
        from reft_core.convert import base_from_folder
        from reft_core.errors import InvalidRequest

        if prompt is not None and base is None:
            raise InvalidRequest.because("base", base, "the base model, whose tokenizer is needed")
        adapter = read_adapter(file)
        model = None if base is None else base_from_folder(base)
        console = Console()
        console.print(_facts(adapter, model))
        ids = None
        if prompt is not None and base is not None:
            tokenizer = load_tokenizer(base)
            ids = encode(prompt, tokenizer, adapter, raw)
        if adapter.spec.sites:
            norms, measured_on = _norms(adapter, base, model, ids)
            console.print(_sites(adapter, norms))
            console.print(f"‖Δ‖/‖h‖: {measured_on}", markup=False, highlight=False)
        for line in _dead(adapter, None if ids is None else len(ids)):
            console.print(line, markup=False, highlight=False)
        if ids is not None:
            for drawn in drawn_tokens(texts(ids, tokenizer), adapter):
                console.print(drawn)


def describe(file: Annotated[Path, typer.Argument(help="An adapter file")]) -> None:
    """Describe an adapter on the axes of the unified view (arXiv 2110.04366, table 1)."""
    with one_line_errors():
        from reft_core.adapter import read_adapter
        from reft_core.describe import describe_adapter

        spec = read_adapter(file).spec
        typer.echo(f"{spec.name}: {spec.method} at positions {spec.positions.rule}\n")
        typer.echo("\n\n".join(describe_text(*where) for where in describe_adapter(spec)))


# -- the parts of inspect --------------------------------------------------------------------


def _facts(adapter: Adapter, model: ModelDescription | None) -> Table:
    """Everything the spec says in a line each."""
    spec = adapter.spec
    rule = adapter.rule
    parameters = f"{spec.num_parameters:,}"
    if model is not None:
        share = 100 * spec.num_parameters / model.num_parameters
        parameters += f" ({share:.4g} % of the {model.num_parameters:,} of {model.name})"
    positions = f"{spec.positions.rule} ({'tied' if rule.num_units == 1 else 'untied'}"
    positions += f", {spec.positions.anchor}, cap {spec.positions.cap})"
    prefix = spec.prefix
    rows = {
        "name": spec.name,
        "description": spec.description,
        "licence": spec.licence,
        "digest": adapter.digest,
        "bytes": f"{adapter.num_bytes:,} ({spec.dtype})",
        "parameters": parameters,
        "base model": f"{spec.base.name} ({spec.base.architecture}, "
        f"{spec.base.num_layers} layers of {spec.base.hidden_size})",
        "fits": "" if model is None else _fit(adapter, model),
        "method": spec.method,
        "positions": positions if spec.sites else "",
        "prefix": "" if prefix is None else f"{prefix.length} virtual tokens, {prefix.kind}",
        "head": "" if spec.head is None else _head(spec.head),
        "labels": ", ".join(label.strip() for label in spec.task.labels or ()),
        "subspaces": ", ".join(f"{k}: {ranges(v)}" for k, v in (spec.subspaces or {}).items()),
        "strength": str(spec.strength),
        "template": "its own" if spec.template else "the base model's",
        "made by": spec.training.tool,
        "metrics": ", ".join(f"{k} {v:.4g}" for k, v in spec.training.metrics.items()),
    }
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        if value:
            table.add_row(key, safe(value))
    return table


def _fit(adapter: Adapter, model: ModelDescription) -> str:
    """Whether the adapter was made for ``model``, and if not, why."""
    why_not = _misfit(adapter, model)
    return model.name if why_not is None else f"not {model.name}: {why_not}"


def _misfit(adapter: Adapter, model: ModelDescription) -> str | None:
    """Why the adapter was not made for ``model``; None if it was."""
    from reft_core.adapter import check_fits
    from reft_core.errors import AdapterMismatch

    try:
        check_fits(adapter.spec, model)
    except AdapterMismatch as error:
        return error.message
    return None


def _norms(
    adapter: Adapter, base: str | None, model: ModelDescription | None, ids: list[int] | None
) -> tuple[dict[str, DeltaNorm], str]:
    """How far the edits move states at each site, and which states they were."""
    from reft_core.errors import UnsupportedModel
    from reft_core.loading import load_any
    from reft_core.threads import run_in_own_thread
    from server.cli.norms import NUM_SAMPLES, delta_norms, delta_norms_on

    why_not = "no prompt was given"
    if base is not None and model is not None and ids is not None:
        why_not = _misfit(adapter, model) or ""
        if not 1 <= len(ids) <= model.max_positions:
            why_not = f"{len(ids)} prompt tokens, not 1 to {model.max_positions}"
        if not why_not:
            try:
                loaded = load_any(base)
            except UnsupportedModel as error:
                why_not = printable(error.message.splitlines()[0])
            else:
                norms = run_in_own_thread(lambda: delta_norms_on(adapter, loaded, ids))
                without = "" if adapter.prefix is None else ", without its virtual tokens"
                return norms, f"mean over the edited tokens of this prompt{without}"
    return delta_norms(adapter), f"on {NUM_SAMPLES} random states, not the base's ({why_not})"


def _sites(adapter: Adapter, norms: Mapping[str, DeltaNorm]) -> Table:
    """One row a site, with how far its edits move states."""
    units = adapter.rule.num_units
    table = Table("site", "layers", "rank", "phase", "reads", "parts", "parameters", "‖Δ‖/‖h‖")
    for name, site in adapter.spec.sites.items():
        hidden = adapter.spec.base.hidden_size
        shapes = [site.shape(part, hidden) for part in site.parts]
        size = sum(math.prod(shape) for shape in shapes) * len(site.layers) * units
        norm = norms.get(name)
        activation = "" if site.activation == "identity" else f" ({site.activation})"
        table.add_row(
            name,
            ranges(site.layers),
            str(site.rank),
            site.phase,
            site.source,
            " ".join(site.parts) + activation,
            f"{size:,}",
            "no token is edited"
            if norm is None
            else f"{norm.mean:.3g}, at most {norm.largest:.3g} in layer {norm.largest_layer}",
        )
    return table


def _head(head: HeadSpec) -> str:
    """A classification head in a line."""
    dense = "" if head.hidden is None else f", dense {head.hidden} with {head.activation}"
    return f"pooling {head.pooling}{dense}"


def _dead(adapter: Adapter, prompt_len: int | None) -> Iterable[str]:
    """Lines about edits that change no answer; one line if there are none."""
    from reft_core.batch import AdapterUse
    from server.cli.inspection import dead_edits

    dead = dead_edits(adapter, prompt_len)
    of_generated = AdapterUse(adapter).decode_keys()
    if dead.switched_off and adapter.edits:
        yield "dead: every edit, unless a request gives a strength: the default is 0"
    if dead.zero:
        yield f"dead: Δ is zero at {_keys(dead.zero, adapter)}"
    for key, (unread, edited) in dead.unread.items():
        also = "; generated tokens are read" if key in of_generated else ""
        yield (
            f"dead: {unread} of {edited} positions at {_keys([key], adapter)}, on a prompt of "
            f"{dead.prompt_len} tokens: nothing reads the last layer there{also}"
        )
    if adapter.edits and not (dead.zero or dead.unread or dead.switched_off):
        yield "dead: no edit"


def _keys(keys: Sequence[EditKey], adapter: Adapter) -> str:
    """Edits by layer and site, and unit where there are two."""
    untied = adapter.rule.num_units > 1
    shown = [
        f"layer {key.layer} {key.site}{f' unit {key.unit}' if untied else ''}"
        for key in keys[:_MOST_SHOWN]
    ]
    more = len(keys) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
