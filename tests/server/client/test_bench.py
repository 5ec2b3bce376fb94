"""The benchmark of a server: what it asks, what it counts, and how it fails."""

from __future__ import annotations

import json
import threading
from collections import Counter
from itertools import islice

import pytest
from typer.testing import CliRunner

from reft_core.errors import InvalidRequest, RequestFailed
from server.cli.main import app
from server.client.address import api_url
from server.client.bench_report import percentile, summarise
from server.client.connection import options
from server.client.measure import Run, Seen, measure
from server.client.workload import Shape, bodies, own_prompts, read_prompts
from tests.server.fakes import MODEL, make_adapter, wait_until

runner = CliRunner()


def shape(**changes) -> Shape:
    defaults = {
        "models": ("a", "b"), "num_requests": 5, "max_tokens": 7, "temperature": 0.0,
        "ignore_eos": False, "completions": False,
    }  # fmt: skip
    return Shape(**(defaults | changes))


def test_models_take_turns_and_each_is_asked_the_same():
    asked = list(bodies(shape(), None))
    assert [body["model"] for body in asked] == ["a", "b", "a", "b", "a"]
    assert asked[0]["messages"] == asked[1]["messages"] != asked[2]["messages"]
    assert "ignore_eos" not in asked[0]


def test_own_prompts_have_no_beginning_in_common():
    said = [messages[0]["content"] for messages in islice(own_prompts(), 500)]
    assert len({" ".join(text.split()[:2]) for text in said}) == 500


def test_completions_get_text(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n\ntwo\n")
    asked = bodies(shape(completions=True, models=("a",), ignore_eos=True), read_prompts(path))
    assert [body["prompt"] for body in asked] == ["one", "two", "one", "two", "one"]


def test_prompts_in_json_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = ["text", {"prompt": "p"}, {"instruction": "i", "completion": "c"},
            {"messages": [{"role": "system", "content": "s"}]}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path)
    assert [messages[0]["content"] for messages in found] == ["text", "p", "i", "s"]
    for wrong in ("{", "3", '{"text": "x"}'):
        path.write_text(wrong)
        with pytest.raises(InvalidRequest, match=r"p\.jsonl:1"):
            read_prompts(path)
    path.write_text("\n")
    with pytest.raises(InvalidRequest, match="at least one prompt"):
        read_prompts(path)
    with pytest.raises(InvalidRequest, match="No such file"):
        read_prompts(tmp_path / "none")


def test_percentiles_are_values_that_were_seen():
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (50, 95, 99)] == [50, 95, 99]
    assert percentile([3.0], 99) == 3
    assert percentile([], 50) is None


def test_the_figures_are_of_requests_that_went_well():
    good = Seen("a", 10.0, 13.0, [11.0, 11.5, 13.0], {"completion_tokens": 6, "prompt_tokens": 4})
    short = Seen("a", 10.0, 12.0, [12.0])
    bad = Seen("a", 10.0, 19.0, [11.0], error="broken")
    found = summarise([good, short, bad], 2.0)
    assert (found["requests"], found["errors"]) == (3, 1)
    assert found["error_messages"] == {"broken": 1}
    assert (found["completion_tokens"], found["prompt_tokens"]) == (7, 4)
    assert found["tokens_per_s"] == 3.5
    assert found["ttft_ms"] == {"p50": 1000, "p95": 2000, "p99": 2000}
    assert found["inter_token_ms"] == {"p50": 500, "p95": 1500, "p99": 1500}
    assert summarise([bad], 2.0)["ttft_ms"]["p50"] is None


def run(server, *args: str):
    args = ("bench", "--url", server.url, *args)
    return runner.invoke(app, list(args), env={"COLUMNS": "160"})


def test_a_run_asks_every_model_and_counts_everything(live, engine):
    live.upload("tone", make_adapter(1))
    result = run(live, "-m", MODEL.name, "-m", "tone", "-n", "20", "-j", "4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {name: row["requests"] for name, row in found["models"].items()} == {
        MODEL.name: 10, "tone": 10
    }  # fmt: skip
    total = found["all"]
    assert (total["requests"], total["errors"]) == (20, 0)
    # The end token counts too.
    assert total["completion_tokens"] == 10 * len("I am base.x") + 10 * len("I am 012345.x")
    assert total["tokens_per_s"] > 0
    for name in ("ttft_ms", "inter_token_ms", "request_ms"):
        assert total[name]["p50"] <= total[name]["p95"] <= total[name]["p99"]
    assert len(engine.submitted) == 22


def test_the_table_and_the_completions_api(live):
    result = run(live, "-n", "3", "--completions")
    assert result.exit_code == 0, result.output
    for part in ("tiny-base", "tokens/s", "p50/p95/p99", "3 requests"):
        assert part in result.stdout


def test_errors_are_counted_and_make_the_status_1(live, engine):
    engine.failure = RequestFailed("it broke")
    engine.fail_after = 2
    engine.fails = lambda request: len(engine.submitted) % 2 == 0
    result = run(live, "-n", "6", "-j", "1", "--json", "--warmup", "0")
    assert result.exit_code == 1
    total = json.loads(result.stdout)["all"]
    assert (total["requests"], total["errors"]) == (6, 3)
    assert total["error_messages"] == {"it broke": 3}
    assert "3 × it broke" in result.stderr


@pytest.mark.parametrize(
    ("args", "mention"),
    [
        (["--url", "http://127.0.0.1:9"], "nothing answers"),
        (["--url", "http://127.0.0.1:9", "-m", "x"], "nothing answers"),
        (["--prompts", "/no/file"], "prompts: got '/no/file'"),
    ],
)
def test_mistakes_are_one_line(args, mention):
    result = runner.invoke(app, ["bench", *args])
    assert (result.exit_code, mention in result.stderr) == (1, True), result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_model_that_is_not_there_is_found_before_measuring(live):
    result = run(live, "-m", "nobody")
    assert result.exit_code == 1
    assert "nobody" in result.stderr
    assert result.stdout == ""


def test_as_many_at_a_time_as_asked(live, engine):
    """Held back, exactly that many are open; then all of them end."""
    engine.pause()
    found: list[Run] = []

    def work() -> None:
        asked = bodies(shape(models=(MODEL.name,), num_requests=7), None)
        path = "/chat/completions"
        found.append(measure(options(api_url(live.url), None, 20), path, asked, 3, lambda _: None))

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: engine.num_open == 3, "three requests")
    assert len(engine.submitted) == 3
    engine.resume()
    thread.join(20)
    assert Counter(seen.error for seen in found[0].seen) == {None: 7}
