from __future__ import annotations

import json
from pathlib import Path

import pytest

from reft_core.errors import TrainingError
from reft_core.positions import PositionRule
from reft_core.spec import TemplateSpec
from reft_core.templates import encode_chat
from tests.trainer.factories import byte_tokenizer, write_rows
from trainer.data import Dataset, RowFormat, check_no_leak, load_dataset, tokenise
from trainer.data.reading import read_source
from trainer.data.sources import read_file

GOOD = {"instruction": "2+2?", "completion": "4"}
RULE = PositionRule.parse("l1")


def dataset(folder: Path, rows: list[object], name: str = "rows.jsonl", **fields) -> Dataset:
    return load_dataset(write_rows(folder / name, rows), **fields)


def test_both_row_forms_are_read(tmp_path: Path) -> None:
    found = dataset(
        tmp_path,
        [
            GOOD,
            {"instruction": "Sum", "input": "1 2", "completion": "3"},
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "hello"},
                    {"role": "user", "content": "bye"},
                    {"role": "assistant", "content": "ciao"},
                ]
            },
        ],
    ).examples
    assert found[0].turns == (("user", "2+2?"),)
    assert found[1].turns == (("user", "Sum\n\n1 2"),)
    assert [role for role, _ in found[2].turns] == ["system", "user", "assistant", "user"]
    assert [example.completion for example in found] == ["4", "3", "ciao"]
    assert found[2].question == "bye"


def test_an_input_is_put_where_its_template_says(tmp_path: Path) -> None:
    row = {"instruction": "Sum {input}", "input": "{instruction}", "completion": "3"}
    source = read_file(write_rows(tmp_path / "rows.jsonl", [row]))
    found = read_source(source, RowFormat(input_template="In: {input}\nDo: {instruction}"))
    assert found.examples[0].question == "In: {instruction}\nDo: Sum {input}"


def test_a_system_message_is_put_before_rows_without_one(tmp_path: Path) -> None:
    own = {
        "messages": [
            {"role": "system", "content": "own"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    }
    first, second = dataset(tmp_path, [GOOD, own], system="ours").examples
    assert first.turns == (("system", "ours"), ("user", "2+2?"))
    assert second.turns[0] == ("system", "own")
    assert len(second.turns) == 2


def turn(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "x"}, "has no 'completion'"),
        ({"completion": "x"}, "has no 'instruction'"),
        ({"instruction": "x", "completion": "  "}, "completion is empty"),
        ({"instruction": " ", "completion": "x"}, "instruction is empty"),
        ({"instruction": "x", "completion": 4}, "completion is int"),
        ({**GOOD, "inptu": "x"}, "unknown column 'inptu', did you mean 'input'"),
        ({**GOOD, "messages": []}, "'instruction' does not go with 'messages'"),
        (["x"], "expected a JSON object"),
        ({"messages": [turn("user", "x")]}, "a question and its answer"),
        ({"messages": "x"}, "a question and its answer"),
        ({"messages": [turn("user", "x"), "y"]}, r"messages\[1\]: got str"),
        ({"messages": [turn("user", "x"), {"role": "assistant"}]}, "has no 'content'"),
        ({"messages": [turn("tool", "x"), turn("assistant", "y")]}, "role 'tool'"),
        ({"messages": [turn("assistant", "x"), turn("user", "y")]}, "last message is the user's"),
        ({"messages": [turn("user", "x"), turn("assistant", "")]}, "completion is empty"),
        ({"messages": [turn("user", None), turn("assistant", "y")]}, "content is NoneType"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(TrainingError, match=rf"rows\.jsonl:3: .*{problem}"):
        load_dataset(path)


@pytest.mark.parametrize("line", ["{oops", "[" * 100_000])
def test_broken_json_is_named_by_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + f"\n{line}\n")
    with pytest.raises(TrainingError, match=r"rows\.jsonl:2: not valid JSON"):
        load_dataset(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe{}"])
def test_a_file_without_readable_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"rows\.jsonl: (holds no rows|not UTF-8)"):
        load_dataset(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        load_dataset(tmp_path / "nowhere.jsonl")


def test_a_line_separator_inside_a_text_does_not_end_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a\u2028b", "completion": "c"}\n', encoding="utf-8")
    assert load_dataset(path).examples[0].question == "a\u2028b"


def test_completions_must_be_labels(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r":1: completion '4' is none of the labels; known are 3, 5"
    ):
        dataset(tmp_path, [GOOD], labels=["5", "3"])
    assert dataset(tmp_path, [GOOD], labels=["4", "3"]).examples


def test_repeated_rows_are_counted(tmp_path: Path) -> None:
    found = dataset(tmp_path, [GOOD, {**GOOD, "completion": "5"}, GOOD])
    assert found.num_duplicates == 1
    assert len(found.examples) == 3


def test_a_prompt_in_two_splits_is_refused(tmp_path: Path) -> None:
    train = dataset(tmp_path, [{"instruction": "a", "completion": "b"}, GOOD], "train.jsonl")
    other = dataset(tmp_path, [{"instruction": "c", "completion": "d"}], "valid.jsonl")
    check_no_leak(train, other)
    leaking = dataset(tmp_path, [{**GOOD, "completion": "four"}], "test.jsonl")
    with pytest.raises(TrainingError, match=r"test\.jsonl:1: .*train\.jsonl:2"):
        check_no_leak(train, leaking)


@pytest.mark.parametrize("template", [None, TemplateSpec(user="Q: {content}\n", generation="A:")])
def test_prompts_are_the_tokens_serving_makes(
    tmp_path: Path, template: TemplateSpec | None
) -> None:
    tokenizer = byte_tokenizer()
    found = dataset(tmp_path, [GOOD])
    (row,) = tokenise(found, tokenizer, RULE, template=template, max_length=100)
    assert list(row.prompt) == encode_chat(tokenizer, found.examples[0].messages, template)
    assert row.completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.completion[:-1]) == "4"


def test_a_row_that_is_too_long_is_refused(tmp_path: Path) -> None:
    found = dataset(tmp_path, [GOOD, {"instruction": "x" * 20, "completion": "y"}])
    assert len(tokenise(found, byte_tokenizer(), RULE, max_length=25)) == 2
    with pytest.raises(TrainingError, match=r"rows\.jsonl:2: 25 tokens .* at most 24"):
        tokenise(found, byte_tokenizer(), RULE, max_length=24)


def test_a_prompt_without_an_edited_position_is_refused(tmp_path: Path) -> None:
    found = dataset(tmp_path, [GOOD])
    with pytest.raises(TrainingError, match="positions '50' edit nothing in its prompt of 7"):
        tokenise(found, byte_tokenizer(), PositionRule.parse("50"), max_length=100)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TrainingError, match="end-of-text"):
        tokenise(dataset(tmp_path, [GOOD]), tokenizer, RULE, max_length=100)
