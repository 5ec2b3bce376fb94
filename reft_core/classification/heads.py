"""Trained heads on an encoder: texts with different adapters and heads in one forward.

After the forward each text's pooled state goes through the head of its own adapter, grouped by
adapter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import Adapter
from reft_core.encoder import MAX_BATCH_TOKENS, Encoder, EncoderRequest
from reft_core.errors import InvalidRequest
from reft_core.loading import LoadedModel
from reft_core.sites import find_layers
from reft_core.spec import Pooling


class HeadedEncoder:
    """One frozen encoder, and the heads of any number of adapters."""

    def __init__(self, loaded: LoadedModel, *, max_batch_tokens: int = MAX_BATCH_TOKENS) -> None:
        """``loaded`` is an encoder without a head, as ``load_encoder`` returns it."""
        self.encoder = Encoder(
            loaded.model,
            find_layers(loaded.model),
            loaded.description,
            max_batch_tokens=max_batch_tokens,
        )

    @torch.inference_mode()
    def logits(self, requests: Sequence[EncoderRequest]) -> list[Tensor]:
        """Each text's float32 logits (L,) over its own adapter's L labels, in order.

        Exactly one adapter of a request has a head. Raises :class:`InvalidRequest`, or
        :class:`AdapterMismatch` for another model's adapter; no text is classified then.
        """
        adapters = [self.check(request) for request in requests]
        found: dict[int, Tensor] = {}
        for places in self.encoder.batches(requests):
            encoded = self.encoder.encode([requests[place] for place in places])
            groups: dict[str, list[int]] = defaultdict(list)
            for row, place in enumerate(places):
                groups[adapters[place].digest].append(row)
            for rows in groups.values():
                adapter = adapters[places[rows[0]]]
                assert adapter.head is not None
                assert adapter.spec.head is not None
                pooled = pool(adapter.spec.head.pooling, encoded.output, encoded.mask)  # (B, d)
                logits = adapter.head.logits(pooled[rows]).cpu()  # (K, L)
                found |= {places[row]: logits[i] for i, row in enumerate(rows)}
        return [found[place] for place in range(len(requests))]

    def check(self, request: EncoderRequest) -> Adapter:
        """The adapter with the request's head, once all of the request is found in order.

        Raises what :meth:`logits` does.
        """
        self.encoder.check(request)
        headed = [use.adapter for use in request.uses if use.adapter.head is not None]
        if len(headed) != 1:
            names = [use.adapter.spec.name for use in request.uses]
            raise InvalidRequest.because("adapters", names, "exactly one that has a head")
        return headed[0]


def pool(pooling: Pooling, output: Any, mask: Tensor) -> Tensor:
    """Pooled states (B, d) of an encoder's ``output`` for texts whose tokens ``mask`` (B, T) marks.

    Raises :class:`InvalidRequest` for a pooling layer that the model has not.
    """
    if pooling == "pooler":
        pooler: Tensor | None = getattr(output, "pooler_output", None)
        if pooler is None:
            raise InvalidRequest.because("head.pooling", pooling, "first or mean on this model")
        return pooler
    states: Tensor = output.last_hidden_state  # (B, T, d)
    if pooling == "first":
        return states[:, 0]
    marked = mask.unsqueeze(-1)
    return (states.float() * marked).sum(1) / marked.sum(1)
