"""What one request for text asks for, however it came in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from reft_core.engine.interface import SamplingParams
from reft_core.grammar import GrammarSpec
from reft_core.spec import TemplateSpec
from server.answering.named import Answering
from server.keys import FREE, Caller

Encode = Callable[[PreTrainedTokenizerBase, TemplateSpec | None], list[list[int]]]
"""Renders and tokenises a request's prompts, given the adapter's own template if it has one."""


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks for."""

    answering: Answering
    encode: Encode
    params: SamplingParams
    """Of each choice; choice i samples with ``seed + i``."""
    fill_context: bool = False
    """Let answers grow to the end of the context instead of ``params.max_tokens``."""
    n: int = 1
    """Choices that each model gives to each prompt."""
    stops: tuple[str, ...] = ()
    priority: int = 0
    grammar: GrammarSpec | None = None
    """What every answer must look like."""
    echoed: tuple[str | None, ...] = ()
    """The prompts' texts, None for tokens, if answers are to begin with them."""
    with_stop_token: bool = False
    """Report log-probabilities also of a token that ends an answer."""
    caller: Caller = FREE
    """Whose names they are, and who pays."""
