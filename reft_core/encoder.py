"""An encoder that reads padded batches, each text with its own adapters.

An encoder reads its whole input at once: there is no decode and no KV cache, so a batch is one
forward with one plan. Every position of its last layer is read, by a head or by a decoder.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_core.adapter import check_fits
from reft_core.batch import AdapterUse, PackedChunk, PromptEdits, build_plan
from reft_core.engine.admission import check_known, check_length, check_not_empty
from reft_core.errors import InvalidRequest
from reft_core.kernels import edited
from reft_core.sites import ModelDescription

MAX_BATCH_TOKENS = 8192
"""Default bound on one forward's tokens, padding included."""


@dataclass(frozen=True)
class EncoderRequest:
    """One text, as token ids with the special tokens its model expects."""

    tokens: tuple[int, ...]
    uses: tuple[AdapterUse, ...] = ()
    """Adapters in the order they act."""
    segments: tuple[int, ...] = ()
    """Of a pair of texts, which of them each token belongs to: 0 or 1. Empty: one text. Models
    without segments do not look at it."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder made of a batch of B texts, padded on the right to T tokens."""

    output: Any
    """As the model returns it; ``last_hidden_state`` is (B, T, d)."""
    mask: Tensor
    """(B, T) int64, 1 where a token stands."""
    lengths: tuple[int, ...]


class Encoder:
    """A frozen encoder and the edits of any number of adapters.

    Safe to call from several threads: forwards take turns.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        description: ModelDescription,
        *,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.model = description
        self._model = model
        self._layers = layers
        self._pad = model.config.pad_token_id or 0
        self._has_segments = has_segments(model)
        self._max_batch_tokens = max_batch_tokens
        self._forward_lock = threading.Lock()

    @property
    def max_tokens(self) -> int:
        """Longest text in tokens."""
        return longest_text(self._model, self.model)

    def check(self, request: EncoderRequest) -> None:
        """Raise :class:`InvalidRequest` or :class:`AdapterMismatch` for what cannot be read."""
        check_not_empty("input", request.tokens)
        check_length("input", len(request.tokens), self.max_tokens)
        check_known("input", request.tokens, self.model.vocab_size)
        assert not request.segments or len(request.segments) == len(request.tokens)
        for use in request.uses:
            check_fits(use.adapter.spec, self.model)
            if use.adapter.prefix is not None:
                raise InvalidRequest.because(
                    "adapters", use.adapter.spec.name, "none with a prefix on an encoder"
                )

    def batches(self, requests: Sequence[EncoderRequest]) -> Iterator[list[int]]:
        """Places of requests that are read together: near in length, to pad little."""
        batch: list[int] = []
        for place in sorted(range(len(requests)), key=lambda i: len(requests[i].tokens)):
            padded = (len(batch) + 1) * len(requests[place].tokens)
            if batch and padded > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    @torch.inference_mode()
    def encode(self, batch: Sequence[EncoderRequest]) -> Encoded:
        """One padded forward with every request's edits. Call :meth:`check` before."""
        device = self._model.device
        lengths = tuple(len(request.tokens) for request in batch)
        width = max(lengths)
        tokens = torch.full((len(batch), width), self._pad)
        segments = torch.zeros_like(tokens)
        chunks = []
        for row, (request, length) in enumerate(zip(batch, lengths, strict=True)):
            tokens[row, :length] = torch.tensor(request.tokens)
            if request.segments:
                segments[row, :length] = torch.tensor(request.segments)
            edits = PromptEdits(request.uses, length, reads="all")
            chunks.append(PackedChunk(row * width, 0, length, edits))
        mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long().to(device)
        plan = build_plan(chunks, device)
        beside = {"token_type_ids": segments.to(device)} if self._has_segments else {}
        with self._forward_lock, edited(self._layers, plan):
            output = self._model(input_ids=tokens.to(device), attention_mask=mask, **beside)
        return Encoded(output, mask, lengths)


def longest_text(model: PreTrainedModel, description: ModelDescription) -> int:
    """Most tokens of a text. RoBERTa's first positions belong to padding."""
    reserved = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None)
    ]
    return description.max_positions - max(reserved, default=0)


def has_segments(model: PreTrainedModel) -> bool:
    """Whether an encoder embeds which text of a pair a token belongs to, as BERT does."""
    return getattr(model.config, "type_vocab_size", 0) > 1
