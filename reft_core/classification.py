"""Classification by an encoder: texts with different adapters and heads in one forward.

An encoder reads its whole input at once, so there is no decode and no KV cache: a batch is one
padded forward with a plan of edits, after which each text's pooled state goes through the head
of its own adapter, grouped by adapter.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import Adapter, check_fits
from reft_core.batch import AdapterUse, PackedChunk, PromptEdits, build_plan
from reft_core.errors import InvalidRequest, PromptTooLong, explain
from reft_core.kernels import edited
from reft_core.loading import LoadedModel
from reft_core.sites import find_layers


@dataclass(frozen=True)
class ClassifyRequest:
    """One text to classify, as token ids with the special tokens its model expects."""

    tokens: tuple[int, ...]
    uses: tuple[AdapterUse, ...]
    """Adapters in the order they act; exactly one of them has a head."""


class EncoderClassifier:
    """Classifies batches of texts with one frozen encoder and any number of adapters.

    Safe to call from several threads: forwards take turns.
    """

    def __init__(self, loaded: LoadedModel, *, max_batch_tokens: int = 8192) -> None:
        """``max_batch_tokens`` bounds one forward's tokens, padding included."""
        self.model = loaded.description
        self._model = loaded.model
        self._layers = find_layers(loaded.model)
        self._device = loaded.model.device
        self._pad = loaded.model.config.pad_token_id or 0
        self._max_batch_tokens = max_batch_tokens
        self._forward_lock = threading.Lock()

    @property
    def max_tokens(self) -> int:
        """Longest text in tokens. RoBERTa's first positions belong to padding."""
        offsets = [
            module.padding_idx + 1
            for name, module in self._model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None)
        ]
        return self.model.max_positions - max(offsets, default=0)

    def logits(self, requests: Sequence[ClassifyRequest]) -> list[Tensor]:
        """Each text's float32 logits (L,) over its own adapter's labels, in order.

        Raises :class:`InvalidRequest`, or :class:`AdapterMismatch` for another model's
        adapter; no text is classified then.
        """
        adapters = [self._check(request) for request in requests]
        found: dict[int, Tensor] = {}
        for places in self._batches(requests):
            groups: dict[str, list[int]] = defaultdict(list)
            for row, place in enumerate(places):
                groups[adapters[place].digest].append(row)
            pooled = self._pooled(
                [requests[place] for place in places], [adapters[place] for place in places]
            )
            for rows in groups.values():
                head = adapters[places[rows[0]]].head
                assert head is not None
                logits = head.logits(pooled[rows]).cpu()  # (K, L)
                found |= {places[row]: logits[i] for i, row in enumerate(rows)}
        return [found[place] for place in range(len(requests))]

    def _check(self, request: ClassifyRequest) -> Adapter:
        """The adapter with the request's head, once all of the request is found in order."""
        if not request.tokens:
            raise InvalidRequest.because("input", (), "at least one token")
        if len(request.tokens) > self.max_tokens:
            raise PromptTooLong(
                explain("input", f"{len(request.tokens)} tokens", f"at most {self.max_tokens}"),
                field="input",
            )
        for token in request.tokens:
            if not 0 <= token < self.model.vocab_size:
                raise InvalidRequest.because("input", token, f"0 to {self.model.vocab_size - 1}")
        for use in request.uses:
            check_fits(use.adapter.spec, self.model)
            if use.adapter.prefix is not None:
                raise InvalidRequest.because(
                    "adapters", use.adapter.spec.name, "none with a prefix on an encoder"
                )
        headed = [use.adapter for use in request.uses if use.adapter.head is not None]
        if len(headed) != 1:
            names = [use.adapter.spec.name for use in request.uses]
            raise InvalidRequest.because("adapters", names, "exactly one that has a head")
        return headed[0]

    def _batches(self, requests: Sequence[ClassifyRequest]) -> Iterator[list[int]]:
        """Places of requests that are computed together: near in length, to pad little."""
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
    def _pooled(self, batch: Sequence[ClassifyRequest], headed: Sequence[Adapter]) -> Tensor:
        """Pooled states (B, d) of one padded forward with every request's edits."""
        lengths = torch.tensor([len(request.tokens) for request in batch])
        width = int(lengths.max())
        tokens = torch.full((len(batch), width), self._pad)
        for row, request in enumerate(batch):
            tokens[row, : lengths[row]] = torch.tensor(request.tokens)
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long().to(self._device)
        chunks = []
        for row, request in enumerate(batch):
            length = len(request.tokens)
            edits = PromptEdits(request.uses, length, reads="all")
            chunks.append(PackedChunk(row * width, 0, length, edits))
        plan = build_plan(chunks, self._device)
        with self._forward_lock, edited(self._layers, plan):
            output = self._model(input_ids=tokens.to(self._device), attention_mask=mask)
        rows = []
        for row, adapter in enumerate(headed):
            assert adapter.spec.head is not None
            pooling = adapter.spec.head.pooling
            if pooling == "pooler":
                rows.append(_pooler_output(output)[row].float())
            elif pooling == "first":
                rows.append(output.last_hidden_state[row, 0].float())
            else:
                rows.append(output.last_hidden_state[row, : lengths[row]].float().mean(0))
        return torch.stack(rows)


def _pooler_output(output: Any) -> Tensor:
    """What the base model's own pooling layer made, (B, d)."""
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooled is None:
        raise InvalidRequest.because("head.pooling", "pooler", "one of first, mean on this model")
    return pooled
