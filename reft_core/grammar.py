"""Grammars for answers: JSON schemas, regular expressions, choices and context-free grammars.

llguidance does the work: it compiles a grammar for a tokenizer and says, token by token, what may
follow. It is part of the ``structured`` extra and is imported on first use.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reft_core.engine.constraint import Constraint
from reft_core.errors import InvalidRequest, UnsupportedFeature, explain
from reft_core.loading import LoadedModel
from reft_core.threads import run_in_own_thread

GrammarKind = Literal["json_schema", "regex", "choice", "grammar"]

_STACK_BYTES_PER_BYTE = 4096
"""A compiler calls itself once for each rule that refers to another. A rule has ten bytes or
more, and no level was seen to need more than 16 KiB."""
_LEAST_STACK_BYTES = 64 * 1024 * 1024
_WHITESPACE = r" |\r?\n[ \t]{0,40}"
"""Between JSON's tokens: a space, or a new line and its indentation. Where it may, a small model
puts out nothing else.
"""


@dataclass(frozen=True)
class GrammarSpec:
    """What answers must look like, as a request says it."""

    kind: GrammarKind
    text: str
    """The schema as JSON, the regular expression, a JSON list of the choices, or a grammar in
    Lark's notation or in GBNF."""
    field: str = "grammar"
    """Where the request says it; named in errors."""
    lenient: bool = False
    """Leave out what cannot be enforced of a JSON schema, instead of refusing it."""


@dataclass(frozen=True)
class GrammarLimits:
    """Bounds of one grammar. Those that count steps bound time too."""

    max_bytes: int = 64 * 1024
    """Of a grammar's text, in UTF-8."""
    max_symbols: int = 200_000
    """In all productions, after compilation."""
    max_lexer_states: int = 50_000
    """One or two kilobytes each, made as an answer needs them."""
    lexer_steps: int = 1_000_000
    """To build the first automaton; about a second."""
    lexer_steps_per_token: int = 200_000
    """To find the tokens that may follow; about 15 ms."""
    parser_items_per_token: int = 20_000
    """The same for the parser; about a millisecond."""


class Grammar:
    """A compiled grammar.

    All its answers share one automaton, which grows with whatever they meet and has a limit. An
    answer that meets the limit goes on with an automaton of its own, and new answers had better
    be given a grammar compiled anew.
    """

    def __init__(self, make_matcher: Callable[[], Any], lark: str = "") -> None:
        self.make_matcher = make_matcher
        """A new matcher, at the beginning, with an automaton of its own."""
        self.lark = lark
        """The same in llguidance's Lark notation."""
        self.matcher = make_matcher()
        """One that stays at the beginning."""
        self.is_worn = False
        """Whether an answer has met the limit of the shared automaton."""

    def start(self) -> Constraint:
        """A constraint for one new answer."""
        return _Answer(self)


class GrammarCompiler:
    """Compiles grammars for one model's tokens. May be used from any thread."""

    def __init__(
        self,
        loaded: LoadedModel,
        limits: GrammarLimits = GrammarLimits(),
    ) -> None:
        self._loaded = loaded
        self._limits = limits
        self._preparing = threading.Lock()
        self._guide: Any = None
        self._trie: Any = None

    def prepare(self) -> None:
        """Load the library and read the tokenizer, once; takes a second or two.

        Raises :class:`UnsupportedFeature` when either cannot be done.
        """
        with self._preparing:
            if self._trie is not None:
                return
            try:
                import llguidance
                import llguidance.hf
            except ImportError as error:
                raise UnsupportedFeature(
                    "constrained output needs the structured extra, which is not installed: "
                    "pip install 'reft-serve[structured]'"
                ) from error
            tokenizer: Any = self._loaded.tokenizer
            try:
                self._trie = llguidance.hf.from_tokenizer(
                    tokenizer,
                    n_vocab=self._loaded.description.vocab_size,
                    eos_token=sorted(self._loaded.eos_token_ids),
                )
            except Exception as error:
                raise UnsupportedFeature(
                    f"constrained output does not work with this model's tokenizer: {error}"
                ) from error
            self._guide = llguidance

    def check_size(self, spec: GrammarSpec) -> None:
        """Raise :class:`InvalidRequest` if a grammar's text is too long."""
        try:
            num_bytes = len(spec.text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest.because(spec.field, spec.text, "valid Unicode") from error
        if num_bytes > self._limits.max_bytes:
            raise InvalidRequest.because(
                spec.field, f"{num_bytes} bytes", f"at most {self._limits.max_bytes} bytes"
            )

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The grammar of a spec. Blocks, and holds no lock meanwhile.

        Raises :class:`InvalidRequest` for one that is invalid or beyond the limits, and what
        :meth:`prepare` raises.
        """
        self.check_size(spec)
        self.prepare()
        try:
            text = self._translate(spec)
            grammar = Grammar(lambda: self._make_matcher(text), _as_lark(text))
        except ValueError as error:
            raise _invalid(spec, str(error)) from error
        # Some grammars turn out to allow nothing, or to be too complex, only when asked.
        if not grammar.matcher.is_error():
            grammar.matcher.compute_logit_bias()
        if grammar.matcher.is_error():
            raise _invalid(spec, grammar.matcher.get_error())
        return grammar

    def _make_matcher(self, text: str) -> Any:
        """A matcher of the library for a grammar in its own form; its errors are its state."""
        guide, limits = self._guide, self._limits
        bounds = guide.LLParserLimits(
            initial_lexer_fuel=limits.lexer_steps,
            step_lexer_fuel=limits.lexer_steps_per_token,
            step_max_items=limits.parser_items_per_token,
            max_lexer_states=limits.max_lexer_states,
            max_grammar_size=limits.max_symbols,
            verbose_errors=False,
        )
        return run_in_own_thread(
            lambda: guide.LLMatcher(self._trie, text, log_level=0, limits=bounds),
            stack_bytes=max(_LEAST_STACK_BYTES, limits.max_bytes * _STACK_BYTES_PER_BYTE),
        )

    def _translate(self, spec: GrammarSpec) -> str:
        """The spec in the library's own form. Raises ValueError for what it cannot read."""
        matcher = self._guide.LLMatcher
        translate: dict[GrammarKind, Callable[[], str]] = {
            "json_schema": lambda: matcher.grammar_from_json_schema(
                spec.text, overrides={"lenient": spec.lenient, "whitespace_pattern": _WHITESPACE}
            ),
            "regex": lambda: matcher.grammar_from_regex(spec.text),
            "choice": lambda: matcher.grammar_from_lark(_one_of(json.loads(spec.text))),
            "grammar": lambda: self._guide.grammar_from("grammar", spec.text),
        }
        return translate[spec.kind]()


class _Answer:
    """How far one answer has come. Implements :class:`Constraint`."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._shares_automaton = True
        self._accepted: list[int] = []

    @property
    def lark(self) -> str:
        """See :class:`Constraint`."""
        return self._grammar.lark

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""
        mask = self._matcher.compute_logit_bias()
        if self._has_failed():
            mask = self._matcher.compute_logit_bias()
            self._check()
        return torch.frombuffer(bytearray(mask), dtype=torch.uint8) != 0

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen."""
        self._accepted.append(token_id)
        self._matcher.consume_token(token_id)
        if self._has_failed():
            self._check()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        finished: bool = self._matcher.is_stopped()
        return finished

    def _has_failed(self) -> bool:
        """Whether the matcher is in an error, and was replaced if another may fare better."""
        if not self._matcher.is_error():
            return False
        if self._shares_automaton:
            self._shares_automaton = False
            self._grammar.is_worn = True
            self._matcher = self._grammar.make_matcher()
            self._matcher.consume_tokens(self._accepted)
        return True

    def _check(self) -> None:
        """Raise ValueError if the matcher is in an error."""
        if self._matcher.is_error():
            raise ValueError(_gist(self._matcher.get_error()))


def _as_lark(text: str) -> str:
    """A grammar in the library's own form, one part of JSON, in Lark's notation."""
    if not text.startswith("{"):
        return text
    (part,) = json.loads(text)["grammars"]
    if part["lark_grammar"] is not None:
        lark: str = part["lark_grammar"]
        return lark
    return f"start: %json {json.dumps(part['json_schema'])}"


def _one_of(choices: list[str]) -> str:
    """A Lark grammar of these strings."""
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _invalid(spec: GrammarSpec, message: str) -> InvalidRequest:
    """The error for a grammar that the library refuses, with its reason."""
    kinds: dict[GrammarKind, str] = {
        "json_schema": "a JSON schema",
        "regex": "a regular expression",
        "choice": "a list of strings",
        "grammar": "a grammar in Lark's notation or GBNF",
    }
    allowed = f"{kinds[spec.kind]} that can be enforced here ({_gist(message)})"
    return InvalidRequest(explain(spec.field, spec.text, allowed), field=spec.field)


def _gist(message: str) -> str:
    """The telling line of a message that may quote a whole grammar."""
    lines = message.strip().splitlines() or [""]
    told = next((line for line in lines if line.startswith("error: ")), lines[0])
    return told.removeprefix("error: ")[:200]
