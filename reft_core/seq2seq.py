"""Encoder-decoder models (T5, BART): edits of the encoder's prompt.

An adapter edits the encoder, which reads the prompt; the decoder never sees an edit, only
states that were edited. So texts with different adapters are encoded in one padded batch and
decoded by transformers' own ``generate``, which has no adapter work to do.

Dimension letters: A answers that are scored at once, T tokens of the longest prompt, C tokens of
the longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from reft_core.encoder import MAX_BATCH_TOKENS, Encoded, Encoder, EncoderRequest
from reft_core.errors import InvalidRequest
from reft_core.loading import LoadedModel
from reft_core.sites import find_layers

_IGNORED = -100
"""Label of padding; transformers' own convention."""


class Seq2SeqGenerator:
    """Greedy or beam answers of one frozen encoder-decoder with any number of adapters."""

    def __init__(self, loaded: LoadedModel, *, max_batch_tokens: int = MAX_BATCH_TOKENS) -> None:
        """``loaded`` is an encoder-decoder, as ``load_seq2seq`` returns it."""
        self._model: Any = loaded.model
        self._max_batch_tokens = max_batch_tokens
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
            self.check(request)
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

    @torch.inference_mode()
    def score(
        self, requests: Sequence[EncoderRequest], answers: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """For each request the log-probability of each of its ``answers``, token ids that end
        as the model's own do: natural log, summed over the tokens.

        Each prompt is encoded once. Raises what :meth:`generate` does.
        """
        for request in requests:
            self.check(request)
        if not any(answers):
            return [[] for _ in requests]
        found: dict[int, list[float]] = {}
        for places in self.encoder.batches(requests):
            encoded = self.encoder.encode([requests[place] for place in places])
            pairs = [(row, answer) for row, place in enumerate(places) for answer in answers[place]]
            width = max((len(answer) for _, answer in pairs), default=1)
            size = max(1, self._max_batch_tokens // (encoded.mask.shape[1] + width))
            scores = [
                score
                for start in range(0, len(pairs), size)
                for score in self._scores(encoded, pairs[start : start + size])
            ]
            for place in places:
                count = len(answers[place])
                found[place], scores = scores[:count], scores[count:]
        return [found[place] for place in range(len(requests))]

    def _scores(self, encoded: Encoded, pairs: Sequence[tuple[int, Sequence[int]]]) -> list[float]:
        """Log-probabilities of answers, each with the row of its prompt in ``encoded``."""
        device = encoded.mask.device
        rows = torch.tensor([row for row, _ in pairs], device=device)
        texts = [torch.tensor(answer, device=device) for _, answer in pairs]
        labels = pad_sequence(texts, batch_first=True, padding_value=_IGNORED)  # (A, C)
        logits = self._model(
            encoder_outputs=BaseModelOutput(encoded.output.last_hidden_state[rows]),  # (A, T, d)
            attention_mask=encoded.mask[rows],
            decoder_input_ids=self._model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits.float()  # (A, C, V)
        losses = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=_IGNORED)
        scores: list[float] = (-losses.double().sum(1)).tolist()
        return scores

    def check(self, request: EncoderRequest) -> None:
        """Refuse what does not end at the encoder's output.

        Raises :class:`InvalidRequest`, or :class:`AdapterMismatch`.
        """
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
