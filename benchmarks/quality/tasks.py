"""The tasks: rows, prompt, base, and what is compared with which settings.

A task is a few parts, each one `reft compare` with a folder of its own, so that parts can be
run apart, by several processes, and gone on with. Prompts and label words are those of several
with which the base does best on validation rows without training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Group = Literal["labels", "encoder", "domains", "choices", "text"]
Settings = Mapping[str, Any]

CAUSAL, ENCODER = "demo", "encoder"
NAMES = {CAUSAL: "SmolLM2-135M-Instruct", ENCODER: "all-MiniLM-L6-v2"}
DTYPES: Mapping[str, Literal["float32", "bfloat16"]] = {CAUSAL: "bfloat16", ENCODER: "float32"}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class QualityTask:
    """One task on one base."""

    name: str
    group: Group
    folder: str
    """Of the data."""
    parts: Mapping[str, Settings]
    """By name, the ``compare`` section of each."""
    config: Settings = field(default_factory=dict)
    """Of training, for all parts; the rows and the base are put to it."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What a label of the data is called in answers; those that are missing keep their name."""
    columns: Mapping[str, str] = field(
        default_factory=lambda: {"text": "text", "text_pair": "text_pair", "label": "label"}
    )
    """What is kept of a row, by the name it gets."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Only rows with these values."""
    also: Sequence[str] = ()
    """Metrics that the same answers are scored by, besides the first of ``config``."""
    base: str = CAUSAL


def template(user: str, generation: str) -> dict[str, str]:
    """A prompt that ends in ``generation``, which the answer follows."""
    return {"user": user, "generation": generation}


_LABELLING = {
    "dtype": DTYPES[CAUSAL],
    "positions": "l1",
    "layers": "every:3",
    "rank": 1,
    "batch_size": 16,
}
_ROWS = {"train_rows": 2000, "valid_rows": 300, "test_rows": 500, "steps": 250, "seeds": SEEDS}

LABELLING: dict[str, Settings] = {
    "loreft": {
        **_ROWS,
        "methods": ["zero_shot", "loreft", "head_only"],
        "settings": {
            "loreft": {"rank": 1, "learning_rate": [4e-3, 8e-3]},
            "head_only": {"learning_rate": [1e-2, 3e-2]},
        },
    },
    "lora": {
        **_ROWS,
        "methods": ["lora"],
        "settings": {"lora": {"rank": 8, "alpha": 16.0, "learning_rate": [1.5e-3, 4e-3]}},
    },
    "rank4": {
        **_ROWS,
        "methods": ["loreft"],
        "settings": {"loreft": {"rank": 4, "layers": "all", "learning_rate": 4e-3}},
    },
    "direft": {
        **_ROWS,
        "methods": ["direft"],
        "settings": {"direft": {"rank": 1, "learning_rate": 8e-3}},
    },
}
"""LoReFT and DiReFT of about 12,000 parameters, LoReFT of rank 4, LoRA of rank 8 on q and v.

LoReFT of rank 1 and LoRA are searched with equal effort, the other two take a setting that an
earlier development run had."""

_TREC = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}
_SNIPS = {
    "AddToPlaylist": "playlist",
    "BookRestaurant": "restaurant",
    "GetWeather": "weather",
    "PlayMusic": "music",
    "RateBook": "rating",
    "SearchCreativeWork": "work",
    "SearchScreeningEvent": "screening",
}

_ENCODER_ROWS = {"train_rows": 2500, "valid_rows": 500, "test_rows": 1000, "seeds": SEEDS}

ENCODING_SEARCHED: dict[str, Settings] = {
    "head": {
        **_ENCODER_ROWS,
        "methods": ["head_only"],
        "search": 4,
        "settings": {"head_only": {"learning_rate": [5e-3, 1e-2, 2e-2, 4e-2]}},
    },
    "loreft": {
        **_ENCODER_ROWS,
        "methods": ["loreft"],
        "search": 2,
        "settings": {
            "loreft": {
                "positions": ["prompt", "f3"],
                "rank": [16, 4],
                "learning_rate": [2e-3, 5e-3],
            }
        },
    },
    "lora": {
        **_ENCODER_ROWS,
        "methods": ["peft_lora"],
        "search": 2,
        "settings": {"peft_lora": {"rank": 8, "learning_rate": [2e-3, 1e-3]}},
    },
}
"""A head alone; LoReFT on every token at rank 16 or on the first three at rank 4; PEFT's LoRA on q
and v."""

ENCODING: dict[str, Settings] = {
    "head": {
        **_ENCODER_ROWS,
        "methods": ["head_only"],
        "settings": {"head_only": {"learning_rate": 1e-2}},
    },
    "loreft": {
        **_ENCODER_ROWS,
        "methods": ["loreft"],
        "settings": {"loreft": {"positions": "prompt", "rank": 16, "learning_rate": 2e-3}},
    },
    "lora": {
        **_ENCODER_ROWS,
        "methods": ["peft_lora"],
        "settings": {"peft_lora": {"rank": 8, "learning_rate": 2e-3}},
    },
}
"""What the search chose on trec's validation rows, taken over without another search."""

ENCODING_RATES: dict[str, Settings] = {
    part: {
        **section,
        "search": 3,
        "settings": {
            method: {
                **settings,
                "learning_rate": [settings["learning_rate"] * k for k in (0.5, 1, 2)],
            }
            for method, settings in section["settings"].items()
        },
    }
    for part, section in ENCODING.items()
}
"""The same with half and twice the rate."""

POOLING: Settings = {
    **_ENCODER_ROWS,
    "methods": ["loreft"],
    "search": 3,
    "settings": {
        "loreft": {
            "positions": "prompt",
            "rank": 16,
            "learning_rate": 1e-3,
            "head": {"pooling": ["mean", "first", "pooler"]},
        }
    },
}
"""At the rate that sst2's validation rows chose."""

SIZES: Settings = {
    **_ENCODER_ROWS,
    "methods": ["loreft"],
    "search": 4,
    "settings": {"loreft": {"positions": "prompt", "rank": [8, 32], "learning_rate": [5e-4, 1e-3]}},
}
"""Half and twice the rank, at that rate and at half of it, which was not tried before."""

_ENCODING: Settings = {
    "dtype": DTYPES[ENCODER],
    "epochs": 3,
    "batch_size": 32,
    "head": {"pooling": "mean", "learning_rate": 5e-3},
}


_CHOICE_ROWS = _ROWS | {"train_rows": 800, "valid_rows": 200, "test_rows": 300, "steps": 100}

CHOOSING: dict[str, Settings] = {
    "loreft": {
        **_CHOICE_ROWS,
        "methods": ["zero_shot", "loreft"],
        "settings": {"loreft": {"rank": 1, "learning_rate": [4e-3, 8e-3]}},
    },
    "lora": {
        **_CHOICE_ROWS,
        "methods": ["lora"],
        "settings": {"lora": {"rank": 8, "alpha": 16.0, "learning_rate": [1.5e-3, 4e-3]}},
    },
}
"""LoReFT of rank 1 and LoRA of rank 8, searched over two rates each."""


_TEXT_ROWS = _ROWS | {"train_rows": 1000, "valid_rows": 100, "test_rows": 200, "steps": 125}

WRITING: dict[str, Settings] = {
    "loreft": {
        **_TEXT_ROWS,
        "methods": ["zero_shot", "loreft"],
        "search": 2,
        "settings": {
            "loreft": {"rank": 1, "positions": ["l1", "l4"], "learning_rate": 4e-3},
        },
    },
    "lora": {
        **_TEXT_ROWS,
        "methods": ["lora"],
        "settings": {"lora": {"rank": 8, "alpha": 16.0, "learning_rate": [5e-4, 1.5e-3]}},
    },
}
"""LoReFT of rank 1 on the last token or on the last four, LoRA of rank 8 at two rates."""

_ASKED = {"instruction": "instruction", "input": "input", "completion": "completion"}


def _text_task(
    name: str, trigger: str, metric: str, also: Sequence[str] = (), **config: Any
) -> QualityTask:
    by_loss = metric == "loss"
    return QualityTask(
        name,
        "text",
        name,
        {part: {**s, "metric": metric} if by_loss else s for part, s in WRITING.items()},
        _LABELLING
        | {"batch_size": 8}
        | ({} if by_loss else {"metrics": (metric,)})
        | {"template": template("{content}\n", trigger)}
        | config,
        columns={**_ASKED, "references": "references"},
        also=also,
    )


def _choice_task(name: str, answers: Sequence[str]) -> QualityTask:
    return QualityTask(
        name,
        "choices",
        name,
        CHOOSING,
        _LABELLING | {"template": template("{content}\n", "the correct answer is")},
        {answer: answer for answer in answers},
        {"text": "instruction", "label": "answer"},
    )


def _encoder_task(
    folder: str, parts: Mapping[str, Settings] = ENCODING, **settings: Any
) -> QualityTask:
    return QualityTask(
        f"{folder}-encoder",
        "encoder",
        folder,
        parts,
        {**_ENCODING, **settings},
        base=ENCODER,
    )


def _numbered(count: int) -> list[str]:
    return [f"answer{number}" for number in range(1, count + 1)]


_ALL = (
    QualityTask(
        "trec",
        "labels",
        "trec",
        LABELLING,
        _LABELLING
        | {
            "template": template(
                "What does this question ask for: abbreviation, description, thing, person, "
                "place or number?\nQuestion: {content}\n",
                "Answer:",
            )
        },
        _TREC,
    ),
    QualityTask(
        "snips",
        "labels",
        "snips",
        LABELLING,
        _LABELLING | {"template": template("Text: {content}\n", "Label:")},
        _SNIPS,
    ),
    QualityTask(
        "sst2",
        "labels",
        "sst2",
        LABELLING,
        _LABELLING | {"template": template("Review: {content}\n", "Sentiment:")},
        {"0": "negative", "1": "positive"},
    ),
    _encoder_task("trec", ENCODING_SEARCHED),
    _encoder_task("sst2", ENCODING_RATES | {"pooling": POOLING, "sizes": SIZES}),
    _encoder_task("cola", metrics=("matthews",)),
    _encoder_task("mrpc"),
    _encoder_task("rte"),
    _encoder_task("stsb"),
    _encoder_task("sick"),
    _encoder_task("banking77"),
    _choice_task("boolq", ("true", "false")),
    _choice_task("ARC-Easy", _numbered(5)),
    _choice_task("ARC-Challenge", _numbered(4)),
    _choice_task("openbookqa", _numbered(4)),
    _choice_task("commonsense_qa", _numbered(5)),
    _text_task("geoquery_sql", "SQL:", "exact_match", ("execution_accuracy",), max_new_tokens=120),
    _text_task("e2e_nlg", "Description:", "bleu", ("rouge_l", "chrf"), max_new_tokens=60),
    _text_task("mawps", "Answer:", "last_number", max_new_tokens=12),
    _text_task("gsm8k", "Answer:", "last_number", max_new_tokens=160),
    _text_task("alpaca", "Response:", "loss"),
    _text_task("dolly", "Response:", "loss"),
)

TASKS: Mapping[str, QualityTask] = {task.name: task for task in _ALL}
