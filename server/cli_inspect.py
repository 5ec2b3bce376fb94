"""``reft adapter inspect`` and ``diff``: what adapter files say, without running them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from server.cli_errors import one_line_errors
from server.cli_methods import describe_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_core.adapter import Adapter, EditKey
    from reft_core.sites import ModelDescription
    from reft_core.spec import HeadSpec

_MOST_SHOWN = 8
_EDITED = "bold black on bright_yellow"


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file")],
    base: Annotated[
        str | None, typer.Option(help="Its base model: folder, hub id or 'demo'; adds % of it")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Show which tokens of this prompt are edited; needs --base")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the prompt as it is, not as a user's message")
    ] = False,
) -> None:
    """Show what an adapter file says and does. Checks all of it; runs none of it."""
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
        if adapter.spec.sites:
            console.print(_sites(adapter))
        tokens = None
        if prompt is not None and base is not None:
            tokens = _tokens(prompt, base, adapter, raw)
        for line in _dead(adapter, None if tokens is None else len(tokens)):
            console.print(line, markup=False, highlight=False)
        if tokens is not None:
            for drawn in _drawn(tokens, adapter):
                console.print(drawn)


def describe(file: Annotated[Path, typer.Argument(help="An adapter file")]) -> None:
    """Describe an adapter on the axes of the unified view (arXiv 2110.04366, table 1)."""
    with one_line_errors():
        from reft_core.adapter import read_adapter
        from reft_core.describe import describe_adapter

        spec = read_adapter(file).spec
        typer.echo(f"{spec.name}: {spec.method} at positions {spec.positions.rule}\n")
        typer.echo("\n\n".join(describe_text(*where) for where in describe_adapter(spec)))


def diff(
    a: Annotated[Path, typer.Argument(help="An adapter file")],
    b: Annotated[Path, typer.Argument(help="Another one")],
    limit: Annotated[int, typer.Option(help="Tensors to list at most", min=1)] = 40,
) -> None:
    """Compare two adapter files: fields of the specs, then tensors."""
    with one_line_errors():
        from reft_core.adapter import read_adapter
        from server.inspection import spec_differences, tensor_differences, tensors_of

        ours, theirs = read_adapter(a), read_adapter(b)
        console = Console()
        if ours.digest == theirs.digest:
            console.print(f"identical files, digest {ours.digest}")
            return
        fields = spec_differences(ours, theirs)
        if fields:
            table = Table("field", "A", "B")
            for name, one, other in fields:
                table.add_row(*(_safe(str(cell)) for cell in (name, one, other)))
            console.print(table)
        else:
            console.print("specs are equal")
        tensors = tensor_differences(ours, theirs)
        if tensors:
            table = Table("tensor", "largest |A − B|", "relative")
            for entry in tensors[:limit]:
                if entry.largest is None or entry.relative is None:
                    table.add_row(entry.name, entry.note, "")
                else:
                    table.add_row(entry.name, f"{entry.largest:.3g}", f"{entry.relative:.3g}")
            console.print(table)
        total = len(tensors_of(ours).keys() | tensors_of(theirs).keys())
        more = f", {limit} of them listed" if len(tensors) > limit else ""
        console.print(f"{len(tensors)} of {total} tensors differ{more}")


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
        "labels": ", ".join(spec.task.labels or ()),
        "subspaces": ", ".join(f"{k}: {_ranges(v)}" for k, v in (spec.subspaces or {}).items()),
        "strength": str(spec.strength),
        "template": "its own" if spec.template else "the base model's",
        "made by": spec.training.tool,
        "metrics": ", ".join(f"{k} {v:.4g}" for k, v in spec.training.metrics.items()),
    }
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        if value:
            table.add_row(key, _safe(value))
    return table


def _fit(adapter: Adapter, model: ModelDescription) -> str:
    """Whether the adapter was made for ``model``, and if not, why."""
    from reft_core.adapter import check_fits
    from reft_core.errors import AdapterMismatch

    try:
        check_fits(adapter.spec, model)
    except AdapterMismatch as error:
        return f"not {model.name}: {error.message}"
    return model.name


def _sites(adapter: Adapter) -> Table:
    """One row a site, with the norm of its Δ on random states."""
    from server.inspection import delta_norms

    norms = delta_norms(adapter)
    units = adapter.rule.num_units
    table = Table("site", "layers", "rank", "phase", "reads", "parts", "parameters", "‖Δ‖/‖h‖")
    for name, site in adapter.spec.sites.items():
        hidden = adapter.spec.base.hidden_size
        shapes = [site.shape(part, hidden) for part in site.parts]
        size = sum(_product(shape) for shape in shapes) * len(site.layers) * units
        norm = norms[name]
        activation = "" if site.activation == "identity" else f" ({site.activation})"
        table.add_row(
            name,
            _ranges(site.layers),
            str(site.rank),
            site.phase,
            site.source,
            " ".join(site.parts) + activation,
            f"{size:,}",
            f"{norm.mean:.3g}, at most {norm.largest:.3g} in layer {norm.largest_layer}",
        )
    return table


def _head(head: HeadSpec) -> str:
    """A classification head in a line."""
    dense = "" if head.hidden is None else f", dense {head.hidden} with {head.activation}"
    return f"pooling {head.pooling}{dense}"


def _dead(adapter: Adapter, prompt_len: int | None) -> Iterable[str]:
    """Lines about edits that change no answer; one line if there are none."""
    from server.inspection import dead_edits

    dead = dead_edits(adapter, prompt_len)
    if dead.zero:
        yield f"dead: Δ is zero at {_keys(dead.zero, adapter)}"
    for key, (unread, edited) in dead.unread.items():
        also = "; generated tokens are read" if _edits_generated(adapter, key) else ""
        yield (
            f"dead: {unread} of {edited} positions at {_keys([key], adapter)}, on a prompt of "
            f"{dead.prompt_len} tokens: nothing reads the last layer there{also}"
        )
    if adapter.edits and not dead.zero and not dead.unread:
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


def _edits_generated(adapter: Adapter, key: EditKey) -> bool:
    """Whether the edit at ``key`` also acts on generated tokens."""
    last_unit = adapter.rule.num_units - 1
    return adapter.spec.sites[key.site].phase == "all" and key.unit == last_unit


# -- a prompt's tokens -----------------------------------------------------------------------


def _tokens(prompt: str, base: str, adapter: Adapter, raw: bool) -> list[str]:
    """Text of each prompt token, as the model would get them."""
    from reft_core.templates import encode_chat, encode_text
    from server.vocabulary import Vocabulary

    tokenizer = _load_tokenizer(base)
    template = adapter.spec.template
    if raw or (template is None and not tokenizer.chat_template):
        ids = encode_text(tokenizer, prompt)
    else:
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}], template)
    vocabulary = Vocabulary(tokenizer)
    return [vocabulary.describe(token_id)[0] for token_id in ids]


def _load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises :class:`UnsupportedModel` if it has none."""
    from transformers import AutoTokenizer

    from reft_core.errors import UnsupportedModel, explain
    from reft_core.loading import DEMO_MODEL, materialise_demo_model

    path = str(materialise_demo_model()) if base == DEMO_MODEL else base
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedModel(
            explain("base", base, f"a model with a tokenizer ({reason})"), field="base"
        ) from None
    return tokenizer


def _drawn(tokens: list[str], adapter: Adapter) -> Iterable[Text]:
    """For each unit a heading, then the prompt with the tokens it edits in ⟦ ⟧ and in colour."""
    spec = adapter.spec
    if spec.prefix is not None:
        yield Text(f"\nbefore the prompt: {spec.prefix.length} virtual tokens")
    if not spec.sites:
        return
    units = adapter.rule.resolve(len(tokens))
    for unit, positions in enumerate(units):
        which = f"unit {unit} edits" if len(units) > 1 else "edits"
        heading = f"\n{which} {len(positions)} of {len(tokens)} prompt tokens"
        phases = {site.phase for site in spec.sites.values()}
        if "all" in phases and unit == len(units) - 1:
            heading += ", and every generated token"
        yield Text(heading, style="bold")
        yield _marked(tokens, frozenset(positions))


def _marked(tokens: list[str], edited: frozenset[int]) -> Text:
    """The tokens in a row; spaces and line ends made visible, borders drawn."""
    drawn = Text(overflow="fold")
    for position, token in enumerate(tokens):
        shown = _printable(token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·"))
        if position in edited:
            drawn.append(f"⟦{shown}⟧", style=_EDITED)
        else:
            follows_plain = position > 0 and position - 1 not in edited
            drawn.append("│" if follows_plain else "", style="dim")
            drawn.append(shown)
    return drawn


# -- text ------------------------------------------------------------------------------------


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _product(shape: Iterable[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _safe(text: Any) -> str:
    """Text from a stranger's file, for a table."""
    return escape(_printable(str(text)))


def _printable(text: str) -> str:
    """``text`` from a stranger's file without characters that steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
