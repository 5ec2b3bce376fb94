"""Encoder-decoder models (T5, BART): edits of the encoder's prompt.

An adapter edits the encoder, which reads the prompt; the decoder never sees an edit, only
states that were edited. So texts with different adapters are encoded in one padded batch and
decoded by transformers' own ``generate``, which has no adapter work to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from reft_core.encoder import MAX_BATCH_TOKENS, Encoder, EncoderRequest
from reft_core.errors import InvalidRequest
from reft_core.loading import LoadedModel
from reft_core.sites import find_layers


class Seq2SeqGenerator:
    """Greedy or beam answers of one frozen encoder-decoder with any number of adapters."""

    def __init__(self, loaded: LoadedModel, *, max_batch_tokens: int = MAX_BATCH_TOKENS) -> None:
        """``loaded`` is an encoder-decoder, as ``load_seq2seq`` returns it."""
        self._model: Any = loaded.model
        encoder = self._model.get_encoder()
        self.encoder = Encoder(
            encoder,
            find_layers(encoder, loaded.description.num_layers),
            loaded.description,
            max_batch_tokens=max_batch_tokens,
        )

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[EncoderRequest], max_tokens: int, *, num_beams: int = 1
    ) -> list[list[int]]:
        """The tokens answered to each request, in order, without start, end and padding.

        Raises :class:`InvalidRequest`, or :class:`AdapterMismatch` for another model's
        adapter; nothing is generated then.
        """
        for name, value in (("max_tokens", max_tokens), ("num_beams", num_beams)):
            if value < 1:
                raise InvalidRequest.because(name, value, "at least 1")
        for request in requests:
            self._check(request)
        found: dict[int, list[int]] = {}
        for places in self.encoder.batches(requests):
            encoded = self.encoder.encode([requests[place] for place in places])
            answers = self._model.generate(
                encoder_outputs=BaseModelOutput(encoded.output.last_hidden_state),
                attention_mask=encoded.mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=num_beams,
            )
            for place, answer in zip(places, answers.tolist(), strict=True):
                found[place] = self._answer(answer)
        return [found[place] for place in range(len(requests))]

    def _check(self, request: EncoderRequest) -> None:
        """Refuse what does not end at the encoder's output."""
        self.encoder.check(request)
        for use in request.uses:
            spec = use.adapter.spec
            if spec.head is not None:
                raise InvalidRequest.because(
                    "adapters", spec.name, "none with a classification head on an encoder-decoder"
                )
            for name, site in spec.sites.items():
                if site.phase == "all":
                    raise InvalidRequest.because(
                        f"sites.{name}.phase", site.phase, "'prompt': the decoder is not edited"
                    )

    def _answer(self, tokens: list[int]) -> list[int]:
        """An answer up to its end-of-text token, without the decoder's start token."""
        end = self._model.generation_config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end}
        answer = tokens[1:]
        return answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))]
