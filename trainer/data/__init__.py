"""Training data: from files, folders and hubs to token ids."""

from trainer.data.examples import Dataset, Example, TokenisedExample, Turn, check_no_leak
from trainer.data.reading import load_dataset
from trainer.data.rows import RowFormat
from trainer.data.tokenising import tokenise

__all__ = [
    "Dataset",
    "Example",
    "RowFormat",
    "TokenisedExample",
    "Turn",
    "check_no_leak",
    "load_dataset",
    "tokenise",
]
