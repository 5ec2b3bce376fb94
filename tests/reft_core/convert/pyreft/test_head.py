"""The classification head beside pyreft's units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedTokenizerBase

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse
from reft_core.classification import HeadedEncoder
from reft_core.convert import base_from_folder, convert
from reft_core.encoder import EncoderRequest
from reft_core.errors import InvalidRequest, UnsupportedFeature
from reft_core.loading import LoadedModel
from reft_core.sites import describe_model
from tests.factories import NoTokenizer
from tests.reference.slow import reference_classify
from tests.reft_core.convert.pyreft.cases import case_options, converted
from tests.reft_core.convert.support import Case, copied, load_case


def test_an_empty_file_of_trained_parameters_is_ignored(tmp_path: Path) -> None:
    """pyreft's trainer writes pytorch_model.bin also when nothing else was trained."""
    case = load_case("pyreft", "loreft-tied")
    folder = copied(case, tmp_path / "a")
    torch.save({}, folder / "pytorch_model.bin")
    assert convert(folder, "pyreft", case_options(case)) == convert(
        case.adapter_folder, "pyreft", case_options(case)
    )


def classifier(name: str, **given: Any) -> tuple[Case, Adapter]:
    case = load_case("pyreft", name)
    base = base_from_folder(str(case.folder / "base"), "tiny-encoder")
    return case, converted(case, **({"base": base, "labels": ("a", "b", "c")} | given))


@pytest.mark.parametrize(
    ("name", "pooling", "hidden"),
    [("roberta-classifier", "first", 24), ("bert-classifier", "pooler", None)],
)
def test_a_classifier_and_its_head_reproduce_pyreft(
    name: str, pooling: str, hidden: int | None
) -> None:
    """Text by text in the reference, and all in one batch in what serves."""
    case, adapter = classifier(name)
    assert adapter.spec.task.labels == ("a", "b", "c")
    assert adapter.spec.head is not None
    assert (adapter.spec.head.pooling, adapter.spec.head.hidden) == (pooling, hidden)
    model = AutoModel.from_pretrained(case.folder / "base").eval().requires_grad_(False)
    tokenizer: PreTrainedTokenizerBase = NoTokenizer()  # type: ignore[assignment]
    loaded = LoadedModel(model, tokenizer, describe_model(model, "tiny-encoder"))
    requests = [EncoderRequest(tuple(prompt), (AdapterUse(adapter),)) for prompt in case.prompts]
    served = HeadedEncoder(loaded).logits(requests)
    for prompt, logits, batched in zip(case.prompts, case.logits, served, strict=True):
        ours = reference_classify(model, prompt, [(adapter, 1.0)])
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batched, logits, atol=1e-5, rtol=1e-5)
        plain = reference_classify(model, prompt, [(adapter, 0.0)])
        assert (plain - logits).abs().max() > 0.1


@pytest.mark.parametrize("labels", [None, ("a", "b")])
def test_a_heads_labels_are_asked_for(labels: tuple[str, ...] | None) -> None:
    with pytest.raises(InvalidRequest, match="labels: got"):
        classifier("roberta-classifier", labels=labels)


def test_labels_without_a_head_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="labels: got"):
        converted(load_case("pyreft", "loreft-tied"), labels=("a", "b"))


def test_other_trained_parameters_are_refused_by_name(tmp_path: Path) -> None:
    case = load_case("pyreft", "loreft-tied")
    folder = copied(case, tmp_path / "a")
    torch.save({"embeddings.weight": torch.zeros(2, 2)}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedFeature, match=r"pytorch_model\.bin.*embeddings\.weight"):
        convert(folder, "pyreft", case_options(case))
