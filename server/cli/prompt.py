"""A prompt's tokens, and which of them an adapter edits, drawn for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from server.cli.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_core.adapter import Adapter

_EDITED = "bold black on bright_yellow"


def encode(
    prompt: str, tokenizer: PreTrainedTokenizerBase, adapter: Adapter, raw: bool
) -> list[int]:
    """The prompt's tokens as the model would get them."""
    from reft_core.templates import encode_chat, encode_text

    template = adapter.spec.template
    if raw or (template is None and not tokenizer.chat_template):
        return encode_text(tokenizer, prompt)
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}], template)


def texts(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of each token."""
    from reft_core.vocabulary import Vocabulary

    vocabulary = Vocabulary(tokenizer)
    return [vocabulary.describe(token_id)[0] for token_id in ids]


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
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


def drawn_tokens(tokens: list[str], adapter: Adapter) -> Iterable[Text]:
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
        shown = printable(token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·"))
        if position in edited:
            drawn.append(f"⟦{shown}⟧", style=_EDITED)
        else:
            follows_plain = position > 0 and position - 1 not in edited
            drawn.append("│" if follows_plain else "", style="dim")
            drawn.append(shown)
    return drawn
