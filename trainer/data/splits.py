"""All rows of a run: the splits that are given, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reft_core.errors import TrainingError
from trainer.config import TrainConfig
from trainer.data.examples import Dataset, check_no_leak
from trainer.data.reading import carve, read_source, without_leaks
from trainer.data.sources import Source, find_splits, read_file


@dataclass(frozen=True)
class Splits:
    """The rows of a run by split (train, valid, and test if there is one)."""

    datasets: Mapping[str, Dataset]
    labels: tuple[str, ...] | None
    """Names of the classes in order, where the config or the source says them."""
    remarks: tuple[str, ...]
    """What a person should know of how they were read."""

    @property
    def train(self) -> Dataset:
        """The rows that are learnt."""
        return self.datasets["train"]


def load_splits(config: TrainConfig) -> Splits:
    """Read and check the rows. Raises :class:`TrainingError` naming file and line."""
    sources = _sources(config)
    remarks: list[str] = []
    datasets = {name: read_source(source, config.row_format) for name, source in sources.items()}
    for column, remark in {c: r for d in datasets.values() for c, r in d.remarks.items()}.items():
        remarks.append(f"column {column!r} is {remark}")
    if "valid" not in datasets:
        train, valid = carve(datasets["train"], config.valid_share, config.seed)
        datasets = {"train": train, "valid": valid} | {
            name: dataset for name, dataset in datasets.items() if name != "train"
        }
        remarks.append(
            f"no validation rows were given: {len(valid.examples)} of "
            f"{len(train.examples) + len(valid.examples)} training rows are kept apart for it"
        )
    _separate(config, datasets, remarks)
    for name, dataset in datasets.items():
        if dataset.num_duplicates:
            remarks.append(f"{name}: {dataset.num_duplicates} rows repeat an earlier one")
    labels = config.labels or sources["train"].labels or None
    if labels:
        seen = {example.completion.strip() for example in datasets["train"].examples}
        if unseen := [label for label in labels if label.strip() not in seen]:
            remarks.append(f"no training row has the label {', '.join(unseen[:10])}")
    return Splits(datasets, labels, tuple(remarks))


def _sources(config: TrainConfig) -> dict[str, Source]:
    """The sources in the order train, valid, test; files given one by one win over a folder's."""
    found = {} if config.data is None else find_splits(config.data)
    labels = found["train"].labels if "train" in found else ()
    for name in ("train", "valid", "test"):
        if (path := getattr(config, name)) is not None:
            found[name] = read_file(path, labels)
    return {name: found[name] for name in ("train", "valid", "test") if name in found}


def _separate(config: TrainConfig, datasets: dict[str, Dataset], remarks: list[str]) -> None:
    """See to it that no row is in two splits, as ``config.leaks`` says."""
    names = list(datasets)
    for index, held_out in enumerate(names):
        for earlier in names[:index]:
            if config.leaks == "refuse":
                check_no_leak(datasets[earlier], datasets[held_out])
                continue
            kept = without_leaks(datasets[earlier], datasets[held_out])
            dropped = len(datasets[earlier].examples) - len(kept.examples)
            if not kept.examples:
                raise TrainingError(f"{datasets[earlier].path}: every row is in {held_out} too")
            if dropped:
                remarks.append(f"{earlier}: {dropped} rows that are in {held_out} too are dropped")
            datasets[earlier] = kept
