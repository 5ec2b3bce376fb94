"""``reft methods``: every method in one table, for a terminal or for the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.cli.errors import one_line_errors

if TYPE_CHECKING:
    from reft_core.describe import Axes
    from reft_core.methods import Intervention
    from reft_core.sites import ModelDescription

_RANK = 8
_VIRTUAL_TOKENS = 8
_HEADER = f"""\
# Methods

Made by `reft methods --markdown > docs/methods.md`; a test keeps it up to date.

Row vectors: h is what a site puts out, x what goes in, and Δ is added to h. *Phase* `prompt`
edits prompt tokens only, so that decode runs the plain base model; `all` edits generated tokens
too. A method may be put on any site of a layer (`block_output`, `attn_output`, `mlp_output`,
`heads`, `linear:<path>`), with either phase; listed are those it is meant for, its own first.

Parameters are what training may change on SmolLM2-135M, in all 30 layers, with one unit and rank
{_RANK}, at the first site named; LoRA on `q_proj` and `v_proj`, BitFit on all linear maps, and
{_VIRTUAL_TOKENS} virtual tokens for the last three. *Import* names the kinds of source that
`reft adapter convert` reads it from.

The ranks of a low-rank edit may have names, its *subspaces*: `subspaces: {{tone: '0:4', topic:
'4:8'}}` in a training config, `--subspaces tone=0:4,topic=4:8` for `reft adapter convert`. All are
trained together. A request that names some, `"reft": {{"subspaces": {{"tone": 0.5}}}}`, weighs
their part of Δ; the ranks it does not name are then off, and what no rank makes (a shift, a gain)
stays.

A request may stack adapters. Each draws its positions on the request's own prompt, whatever the
others do; virtual tokens, of which one adapter at most may bring any, stand before it and are not
counted. Where two edit the same site at the same position, they act in the order of the stack, and
an edit of h reads what the one before it wrote; edits of x read the site's input, which no edit of
that site changes, so they add up. At different sites the one that the forward passes first acts
first, whatever their order. Strength multiplies Δ; at 0 an adapter is left out whole, its virtual
tokens too.
"""


@dataclass(frozen=True)
class _Row:
    """One method, as text."""

    name: str
    equation: str
    phase: str
    sites: str
    reads: str
    parameters: str
    importable: str
    source: str

    def cells(self) -> tuple[str, ...]:
        """In the order of :data:`_COLUMNS`."""
        return (
            self.name,
            self.equation,
            self.phase,
            self.sites,
            self.reads,
            self.parameters,
            self.importable,
            self.source,
        )


_COLUMNS = ("method", "Δ", "phase", "sites", "reads", "parameters", "import", "source")
_VIRTUAL_EQUATION = {
    "kv": "l keys and values a layer, before the prompt",
    "embedding": "l embeddings, before the prompt",
}


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, 'prefix_tuning', 'prompt_tuning' or 'mam'")
    ] = None,
    *,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/methods.md instead of a table")
    ] = False,
) -> None:
    """List the methods: equation, phase, sites, size, origin, and where they import from.

    With a name, describe that one on the axes of the unified view (arXiv 2110.04366, table 1).
    """
    with one_line_errors():
        if name is not None:
            from reft_core.describe import describe_method

            typer.echo("\n\n".join(describe_text(name, axes) for axes in describe_method(name)))
            return
        rows = list(_rows())
        if markdown:
            typer.echo(_HEADER)
            typer.echo("| " + " | ".join(_COLUMNS) + " |")
            typer.echo("|" + " --- |" * len(_COLUMNS))
            for row in rows:
                typer.echo("| " + " | ".join(c.replace("|", "\\|") for c in row.cells()) + " |")
            return
        table = Table(*_COLUMNS)
        for row in rows:
            table.add_row(*(escape(cell.replace("`", "")) for cell in row.cells()))
        Console().print(table)


def describe_text(heading: str, axes: Axes) -> str:
    """A heading and one line for each axis."""
    return "\n".join([heading, *(f"  {label + ':':<25} {text}" for label, text in axes.lines())])


def _rows() -> Iterable[_Row]:
    """The trainable methods as they are registered, then those made of virtual tokens."""
    from reft_core.convert import base_from_folder
    from reft_core.loading import DEMO_MODEL
    from reft_core.methods import METHODS
    from reft_core.methods.virtual import VIRTUAL_METHODS

    model = base_from_folder(DEMO_MODEL)
    for name, method in METHODS.items():
        yield _Row(
            name=f"`{name}`",
            equation=method.equation,
            phase=method.phase,
            sites=", ".join(f"`{site}`" for site in method.sites),
            reads=_reads(method),
            parameters=_share(_num_trainable(method, model), model),
            importable=_importable(name),
            source=method.citation,
        )
    for name, virtual in VIRTUAL_METHODS.items():
        equation, count = _VIRTUAL_EQUATION[virtual.kind], _num_virtual(virtual.kind, model)
        sites = "every layer's attention" if virtual.kind == "kv" else "the input"
        if virtual.intervention is not None:
            inner = METHODS[virtual.intervention]
            equation += f"; {inner.equation}"
            sites += f", `{inner.sites[0]}`"
            count += _num_trainable(inner, model)
        yield _Row(
            name=f"`{name}`",
            equation=equation,
            phase="all",
            sites=sites,
            reads="x" if virtual.intervention else "",
            parameters=_share(count, model),
            importable=_importable(name),
            source=virtual.citation,
        )


def _num_trainable(method: type[Intervention], model: ModelDescription) -> int:
    """Trainable numbers of one unit in every layer, at the method's first site."""
    from reft_core.methods.placement import Placement

    sites = None
    if method.sites == ("linear",):
        linear = tuple(site for site in model.sites if site.startswith("linear:"))
        attention = ("linear:self_attn.q_proj", "linear:self_attn.v_proj")
        sites = attention if method.has_rank else linear
    placement = Placement.on(
        model, method.method, layers=tuple(range(model.num_layers)), rank=_RANK, sites=sites
    )
    return sum(module.num_trainable for module in placement.build(1).values())


def _reads(method: type[Intervention]) -> str:
    """The state that Δ depends on, if it does."""
    if method.parts(method.activations[0]) == ("shift",):
        return ""
    return "h" if method.source == "output" else "x"


def _num_virtual(kind: str, model: ModelDescription) -> int:
    """Numbers of :data:`_VIRTUAL_TOKENS` virtual tokens."""
    per_token = model.hidden_size
    if kind == "kv":
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return _VIRTUAL_TOKENS * per_token


def _share(count: int, model: ModelDescription) -> str:
    return f"{count:,} ({100 * count / model.num_parameters:.3f} %)"


def _importable(name: str) -> str:
    """The kinds of source that can hold a method."""
    from reft_core.convert import METHODS_IN

    return ", ".join(kind for kind, names in METHODS_IN.items() if name in names) or "—"
