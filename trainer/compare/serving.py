"""What a method costs when it serves: which forwards it takes part in, and how much it adds.

The number is counted, not measured: multiply-adds times two of one request of the test split's
mean length, over those of the base alone. It leaves out what depends on a server, above all
whether requests with different adapters share a batch; the scope says that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from typing_extensions import override

from reft_core.adapter import Adapter
from reft_core.loading import LoadedModel
from reft_core.sites import ModelDescription
from trainer.data import TokenisedExample

Scope = Literal[
    "none", "prompt", "text", "every token", "longer prompt", "prefix", "own weights", "head"
]
SCOPES: dict[Scope, str] = {
    "none": "the base itself",
    "prompt": "edits prompt tokens; decode is the base's own",
    "text": "edits tokens of the text in the one forward that there is, and has a head",
    "every token": "takes part in every forward, decode too",
    "longer prompt": "more tokens before every prompt, whose keys and values may be kept",
    "prefix": "virtual tokens before every prompt, to which every token attends",
    "own weights": "a model of its own, which shares no batch and no memory with others",
    "head": "a head on the base's last states; nothing is generated",
}


@dataclass(frozen=True)
class Serving:
    """The cost of one request."""

    scope: Scope
    extra_percent: float
    """Operations beyond the base's, in percent of them."""


@dataclass(frozen=True)
class Workload:
    """A mean request on one base."""

    model: ModelDescription
    prompt_lengths: tuple[int, ...]
    """Tokens."""
    answer: float = 0.0
    """Tokens, the end token included; 0 where nothing is generated."""

    @classmethod
    def of(cls, model: ModelDescription, rows: Sequence[TokenisedExample]) -> Workload:
        """The mean of ``rows``."""
        lengths = tuple(len(row.prompt) for row in rows)
        return cls(model, lengths, fmean(len(row.completion) for row in rows))

    @property
    def prompt(self) -> float:
        """Tokens."""
        return fmean(self.prompt_lengths)

    @property
    def decoded(self) -> float:
        """Tokens that are read after the prompt: the last one is only written."""
        return max(self.answer - 1, 0.0)

    def base_flops(self, extra: float = 0.0, *, generates: bool = True) -> float:
        """Of a request with ``extra`` more prompt tokens; the head runs where a token is wanted."""
        model = self.model
        embedding = model.vocab_size * model.hidden_size
        body = model.num_parameters - embedding  # a tied head is the embedding
        read = self.prompt + extra + (self.decoded if generates else 0)
        head = embedding * self.answer if generates else 0.0
        seen = self.prompt if self.answer == 0 else (read + 1) / 2  # by a token, on average
        return 2 * (body * read + head) + self._attention(read * seen)

    def prefix_flops(self, length: int) -> float:
        """Of attending to ``length`` virtual tokens whose keys and values are given."""
        return self._attention(length * (self.prompt + self.decoded))

    def _attention(self, pairs: float) -> float:
        """Of scores and weighted values for so many pairs of tokens, in all layers."""
        return 4 * self.model.num_layers * self.model.hidden_size * pairs


@dataclass(frozen=True)
class Seq2SeqWorkload(Workload):
    """A mean request on an encoder-decoder."""

    num_encoder: int = 0
    """Parameters that multiply every prompt token."""
    num_decoder: int = 0
    """Parameters that multiply every token of the answer, but for the output layer's."""

    @classmethod
    def on(cls, loaded: LoadedModel, rows: Sequence[TokenisedExample]) -> Seq2SeqWorkload:
        """The mean of ``rows``."""
        work = Workload.of(loaded.description, rows)
        model: Any = loaded.model
        layers = (model.get_encoder(), model.get_decoder())
        embedding = model.get_input_embeddings().weight.numel()
        encoder, decoder = (sum(p.numel() for p in m.parameters()) - embedding for m in layers)
        return cls(work.model, work.prompt_lengths, work.answer, encoder, decoder)

    @override
    def base_flops(self, extra: float = 0.0, *, generates: bool = True) -> float:
        prompt, answer = self.prompt + extra, self.answer if generates else 0.0
        head = self.model.vocab_size * self.model.hidden_size
        attended = prompt * prompt + answer * ((answer + 1) / 2 + prompt)
        read = self.num_encoder * prompt + (self.num_decoder + head) * answer
        return 2 * read + self._attention(attended)


def none() -> Serving:
    """The base's own."""
    return Serving("none", 0.0)


def longer_prompt(work: Workload, extra_tokens: float) -> Serving:
    """Of so many tokens before every prompt, read anew for each."""
    return _share("longer prompt", work, work.base_flops(extra_tokens) - work.base_flops())


def head(work: Workload, num_parameters: int) -> Serving:
    """Of a head instead of an answer: less than the base's where answers are long."""
    flops = work.base_flops(generates=False) + 2 * num_parameters
    return _share("head", work, flops - work.base_flops())


def of_both_sides(work: Workload, num_encoder: int, num_decoder: int) -> Serving:
    """Of so many parameters beside those of an encoder-decoder's encoder and its decoder."""
    flops = 2 * (num_encoder * work.prompt + num_decoder * work.answer)
    return _share("every token", work, flops)


def own_weights() -> Serving:
    """Of a model that is the base's size."""
    return Serving("own weights", 0.0)


def of_adapter(work: Workload, adapter: Adapter) -> Serving:
    """Of an adapter's edits, virtual tokens and head."""
    flops, every_token = 0.0, False
    if adapter.head is not None:
        flops += 2 * sum(tensor.numel() for tensor in adapter.head.tensors().values())
    for key, edit in adapter.edits.items():
        positions = fmean(len(adapter.rule.resolve(n)[key.unit]) for n in work.prompt_lengths)
        if adapter.spec.sites[key.site].phase == "all":
            every_token = True
            if key.unit == adapter.rule.num_units - 1:
                positions += work.decoded
        flops += 2 * positions * sum(tensor.numel() for _, tensor in edit.fold().parts())
    scope: Scope = "every token" if every_token else "prompt"
    if adapter.head is not None:
        scope = "text" if adapter.edits else "head"
    length = adapter.num_virtual_tokens
    if length:
        scope = scope if every_token else "prefix"
        if adapter.has_kv_prefix:
            flops += work.prefix_flops(length)
        else:
            flops += work.base_flops(length) - work.base_flops()
    return _share(scope, work, flops)


def _share(scope: Scope, work: Workload, flops: float) -> Serving:
    return Serving(scope, 100 * flops / work.base_flops())
