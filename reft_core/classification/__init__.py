"""Choosing a label for a text: by an encoder's trained head, or by a causal model's likelihoods.

Both are a :class:`Classifier`, so that whoever asks need not know which one answers.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from reft_core.classification.encoder import EncoderClassifier
from reft_core.classification.encoder_engine import EncoderEngine
from reft_core.classification.heads import HeadedEncoder
from reft_core.classification.interface import (
    Classification,
    Classifier,
    TextRequest,
    TextTicket,
    classify,
)
from reft_core.classification.labels import answer_tokens, counted, label_tokens
from reft_core.classification.likelihood import LikelihoodClassifier
from reft_core.engine.interface import AdapterHost, Engine


def classifier_on(host: AdapterHost, tokenizer: PreTrainedTokenizerBase) -> Classifier:
    """The classifier that a base model allows: an encoder's, or a causal engine's."""
    if isinstance(host, EncoderEngine):
        return EncoderClassifier(host, tokenizer)
    engine: Engine = host  # type: ignore[assignment]  # there are these two kinds of host
    return LikelihoodClassifier(engine, tokenizer)


__all__ = [
    "Classification",
    "Classifier",
    "EncoderClassifier",
    "EncoderEngine",
    "HeadedEncoder",
    "LikelihoodClassifier",
    "TextRequest",
    "TextTicket",
    "answer_tokens",
    "classifier_on",
    "classify",
    "counted",
    "label_tokens",
]
