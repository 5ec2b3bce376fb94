"""The harness against a server over a tiny model, with tasks of a few lines written here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.lm_eval.__main__ import TOLERANCE, measure
from benchmarks.lm_eval.harness import Run, Scored, command_of, write_tasks
from benchmarks.lm_eval.truth import compare, loglikelihood
from benchmarks.peers.environments import LM_EVAL, is_installed
from benchmarks.soak.world import save_tiny_model
from reft_core.loading import LoadedModel, load_model

REVIEWS = [("a fine film", 1), ("dull and far too long", 0), ("I laughed a lot", 1)]
QUESTIONS = [
    ("Which is hot? Answer1: ice Answer2: fire", ["answer1", "answer2"], "answer2"),
    ("Which flies? Answer1: owl Answer2: cow Answer3: pig", ["answer1", "answer2", "answer3"],
     "answer1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm-eval") / "tiny"
    save_tiny_model(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(str(model))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of the form that the tasks read."""
    reviews = [{"text": text, "label": label} for text, label in REVIEWS]
    questions = [
        {"instruction": text, "choices": choices, "answer": answer}
        for text, choices, answer in QUESTIONS
    ]
    for name, rows in (("sst2", reviews), ("ARC-Easy", questions)):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "test.jsonl").write_text(lines)
    return tmp_path


@pytest.mark.skipif(
    not is_installed(LM_EVAL), reason="lm-eval is in no environment; make lm-eval installs it"
)
def test_the_harness_finds_what_transformers_finds(
    model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("measured")
    found = measure(str(model), None, data, limit=10, folder=folder, max_len=200)
    assert [run["client"] for run in found["runs"]] == [
        "local-completions",
        "local-chat-completions",
    ]
    assert found["runs"][0]["num_items"] == {
        "reft_sst2_score": 3,
        "reft_arc_easy_score": 2,
        "reft_sst2_write": 3,
    }
    assert any("reft_sst2_score" in line for line in found["runs"][0]["table"])
    assert str(data) not in json.dumps(found), "where the data lies is nobody's business"
    agreement = found["agreement"]
    assert agreement["num_scores"] == 3 * 2 + 2 + 3
    assert agreement["max_difference"] < TOLERANCE
    assert agreement["num_greedy_differs"] == 0


def test_the_truth_sees_other_numbers(loaded: LoadedModel) -> None:
    logprob, is_greedy = loglikelihood(loaded, "Review: dull\nSentiment:", " negative")
    right = Scored("Review: dull\nSentiment:", " negative", logprob, is_greedy)
    wrong = Scored("Review: dull\nSentiment:", " negative", logprob + 0.5, not is_greedy)
    assert compare(loaded, [right]).max_difference < 1e-5
    found = compare(loaded, [right, wrong])
    assert found.num_scores == 2
    assert found.max_difference == pytest.approx(0.5, abs=1e-5)
    assert found.num_greedy_differs == 1


def test_spaces_before_an_answer_belong_to_it(loaded: LoadedModel) -> None:
    assert loglikelihood(loaded, "a b ", "c") == loglikelihood(loaded, "a b", " c")


def test_tasks_read_the_given_folder_alone(tmp_path: Path) -> None:
    made = write_tasks(tmp_path, tmp_path / "data")
    for path in made.glob("*.yaml"):
        assert f"test: {tmp_path}/data/" in path.read_text()
        assert f"task: {path.stem}\n" in path.read_text()
    assert len(list(made.iterdir())) == 4


def test_a_chat_leaves_tokens_to_the_server() -> None:
    chat, text = (
        command_of(Run(client, "m", ("a", "b")), "http://x", Path("tok"), 99, 5)
        for client in ("local-chat-completions", "local-completions")
    )
    assert "--apply_chat_template" in chat
    assert not any("tokenizer" in part for part in chat)
    assert any("tokenizer=tok" in part and "/v1/completions" in part for part in text)
    assert "a,b" in text
