"""What the page is about: its groups in order, and all tasks that are meant to be on it."""

from __future__ import annotations

GROUPS: dict[str, tuple[str, str]] = {
    "labels": (
        "Labels, by a causal model",
        "The answer is a label behind a plain prompt that ends in its trigger, whose last token is "
        "the one that LoReFT and DiReFT edit (`l1`). A row is right if its label is the likeliest.",
    ),
    "encoder": (
        "Labels and scores, by an encoder with a head",
        "A head on pooled states is trained beside the edits; `head only` is what it reaches "
        "alone. Parameters count the head's. Positions, rank and rates were searched on trec; the "
        "other tasks take them over, sst2 with half and twice the rate to choose from, and there "
        "the head's pooling and the rank were searched as well.",
    ),
    "domains": (
        "Many adapters in one batch",
        "One adapter for each domain, all of them loaded in one engine and asked in mixed batches. "
        "An encoder's parameters count its head's.",
    ),
    "choices": (
        "Multiple choice, by a causal model",
        "The answer is one of the choices behind `the correct answer is`, as in the LoReFT paper's "
        "commonsense tasks; a row is right if its choice is the likeliest.",
    ),
    "text": (
        "Written answers, by a causal model",
        "Greedy answers of our engine, scored as the metric says, or the loss in nats a token of "
        "held-out answers (↓: lower is better).",
    ),
}

NOT_RUN: dict[str, str] = {
    "trec": "six question classes, causal",
    "snips": "seven intents, causal",
    "sst2": "sentiment, causal",
    **{
        f"{name}-encoder": f"{name} by the encoder"
        for name in ("trec", "sst2", "cola", "mrpc", "rte", "stsb", "sick", "banking77")
    },
    "clinc150": "one adapter for each of ten domains, served together, causal",
    "clinc150-encoder": "the same by the encoder",
    "boolq": "accuracy",
    "ARC-Easy": "accuracy",
    "ARC-Challenge": "accuracy",
    "openbookqa": "accuracy",
    "commonsense_qa": "accuracy",
    "geoquery_sql": "SQL, exact match and execution accuracy",
    "e2e_nlg": "BLEU",
    "mawps": "right last number",
    "gsm8k": "right last number",
    "alpaca": "held-out loss",
    "dolly": "held-out loss",
}
"""Everything that the page is meant to have, by the name of its task."""
