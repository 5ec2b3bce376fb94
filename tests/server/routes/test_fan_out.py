"""``reft.models``: one request, several models, an answer from each."""

from __future__ import annotations

import json
import threading

import pytest

from reft_core.adapter import decode_adapter
from reft_core.engine.interface import AdapterChoice
from reft_core.errors import (
    AdapterFileInvalid,
    DeadlineExceeded,
    EngineOverloaded,
    PromptTooLong,
    ReftError,
    RequestFailed,
)
from reft_core.vocabulary import Vocabulary
from server.settings import Settings
from tests.factories import random_adapter_bytes
from tests.reference.slow import reference_generate
from tests.server.conftest import Server
from tests.server.fakes import (
    BRACKETS,
    MODEL,
    FakeEngine,
    ended,
    make_adapter,
    make_tiny_model,
    wait_until,
)
from tests.server.routes.test_chat import HELLO, ask, prompt_text
from tests.server.routes.test_completions import complete, events
from tests.server.routes.test_live import asking

BASE = MODEL.name


@pytest.fixture
def digests(server: Server) -> dict[str, str]:
    """Two adapters, one with a template of its own, and an older version of the first."""
    old = server.upload("tone", make_adapter(1))["digest"]
    return {
        "tone@1": old,
        "tone": server.upload("tone", make_adapter(2))["digest"],
        "mood": server.upload("mood", make_adapter(3, name="mood", template=BRACKETS))["digest"],
    }


def test_every_model_answers_in_order(server: Server, digests: dict[str, str]) -> None:
    names = ["mood", "tone@1", BASE, "tone", "mood"]
    answer = complete(server, prompt="hello", max_tokens=99, reft={"models": names})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4]
    expected = [f"I am {digests[name][:6]}." if name != BASE else "I am base." for name in names]
    assert [choice["text"] for choice in answer["choices"]] == expected
    reports = [choice["reft"] for choice in answer["choices"]]
    assert reports[1] == {
        "model": "tone@1",
        "adapter": f"tone@sha256:{digests['tone@1'][:12]}",
        "version": 1,
        "digest": digests["tone@1"],
        "stack": [],
        "num_edits": 4,  # two positions in two layers
    }
    assert [report["model"] for report in reports] == names
    assert reports[2]["digest"] is None
    assert answer["reft"] == {"models": reports, "num_edits": 16}
    assert answer["model"] == BASE


def test_a_choice_of_one_model_says_nothing_of_it(server: Server, digests: dict[str, str]) -> None:
    answer = complete(server, model="tone", n=2)
    assert all("reft" not in choice for choice in answer["choices"])
    assert answer["reft"]["digest"] == digests["tone"]
    chat = ask(server, model="tone").json()
    assert all("reft" not in choice for choice in chat["choices"])


def test_a_list_of_one_is_a_fan_out_too(server: Server, digests: dict[str, str]) -> None:
    answer = complete(server, model="tone", reft={"models": ["tone"]})
    assert [choice["reft"]["digest"] for choice in answer["choices"]] == [digests["tone"]]
    assert len(answer["reft"]["models"]) == 1


def test_prompts_and_choices_come_model_by_model(
    server: Server, engine: FakeEngine, digests: dict[str, str]
) -> None:
    answer = complete(
        server, prompt=["ab", "cde"], n=2, seed=7, echo=True, reft={"models": ["tone", "mood"]}
    )
    texts = [choice["text"] for choice in answer["choices"]]
    tone, mood = f"I am {digests['tone'][:6]}.", f"I am {digests['mood'][:6]}."
    prompts = ["ab", "ab", "cde", "cde"]
    assert texts == [p + tone for p in prompts] + [p + mood for p in prompts]
    models = [choice["reft"]["model"] for choice in answer["choices"]]
    assert models == ["tone"] * 4 + ["mood"] * 4
    assert [request.params.seed for request in engine.submitted] == [7, 8] * 4
    assert [report["num_edits"] for report in answer["reft"]["models"]] == [16, 16]
    # Each prompt counts once a model, however many choices it has.
    assert answer["usage"]["prompt_tokens"] == 2 * (2 + 3)


def test_all_are_submitted_together(server: Server, engine: FakeEngine, digests: object) -> None:
    complete(server, reft={"models": ["tone", "mood", BASE]}, n=2)
    assert (len(engine.submitted), engine.num_batches) == (6, 1)


def test_each_prompt_is_rendered_with_its_models_template(
    server: Server, engine: FakeEngine, loaded: object, digests: dict[str, str]
) -> None:
    body = ask(server, reft={"models": ["tone", "mood", BASE]}, max_tokens=50).json()
    plain = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    found = [prompt_text(engine, loaded, i) for i in range(3)]
    assert found == [plain, "U[hello]", plain]
    tokens = [len(request.prompt) for request in engine.submitted]
    assert body["usage"]["prompt_tokens"] == sum(tokens)
    contents = [choice["message"]["content"] for choice in body["choices"]]
    assert contents[:2] == [f"I am {digests[name][:6]}." for name in ("tone", "mood")]
    assert [choice["reft"]["model"] for choice in body["choices"]] == ["tone", "mood", BASE]


def test_options_are_for_all_and_each_may_have_its_own(
    server: Server, engine: FakeEngine, digests: dict[str, str]
) -> None:
    models = ["tone", {"model": "tone", "strength": 0}, {"model": BASE, "strength": None}]
    models += [{"model": "mood", "strength": -1.5}]
    complete(server, reft={"strength": 0.5, "models": models})
    tone, mood = digests["tone"], digests["mood"]
    assert [request.adapters for request in engine.submitted] == [
        (AdapterChoice(tone, 0.5),),
        (AdapterChoice(tone, 0),),
        (),  # the base model has no edits to scale
        (AdapterChoice(mood, -1.5),),
    ]


def test_a_stack_acts_after_each(
    server: Server, engine: FakeEngine, digests: dict[str, str]
) -> None:
    stack = [{"model": "mood", "strength": 2}]
    answer = complete(server, reft={"models": ["tone", BASE], "stack": stack})
    second = AdapterChoice(digests["mood"], 2)
    assert [request.adapters for request in engine.submitted] == [
        (AdapterChoice(digests["tone"]), second),
        (second,),
    ]
    reports = [choice["reft"] for choice in answer["choices"]]
    assert [report["digest"] for report in reports] == [digests["tone"], None]
    assert [[used["digest"] for used in report["stack"]] for report in reports] == [
        [digests["mood"]],
        [digests["mood"]],
    ]


def test_a_completion_streams_all_of_them(server: Server, digests: dict[str, str]) -> None:
    names = ["tone", BASE, "mood"]
    body = {"model": BASE, "prompt": "hello", "stream": True, "max_tokens": 99}
    body |= {"reft": {"models": names}, "stream_options": {"include_usage": True}}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.headers["x-reft-models"] == "3"
    assert "x-reft-adapter" not in answer.headers
    chunks = events(answer)
    texts = ["", "", ""]
    reports: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if "reft" in choice:
            reports[choice["index"]].append(choice["reft"]["model"])
    assert texts == [f"I am {digests['tone'][:6]}.", "I am base.", f"I am {digests['mood'][:6]}."]
    assert reports == {0: ["tone"], 1: [BASE], 2: ["mood"]}, "once a choice"
    assert [model["model"] for model in chunks[0]["reft"]["models"]] == names
    assert chunks[-1]["usage"]["prompt_tokens"] == 3 * 4


def test_a_chat_streams_all_of_them(server: Server, digests: dict[str, str]) -> None:
    chunks = events(ask(server, stream=True, n=2, reft={"models": ["tone", "mood"]}))
    opened = [chunk["choices"][0] for chunk in chunks[:4]]
    assert [choice["reft"]["model"] for choice in opened] == ["tone", "tone", "mood", "mood"]
    assert [choice["index"] for choice in opened] == [0, 1, 2, 3]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in opened)
    texts = ["", "", "", ""]
    for chunk in chunks[4:]:
        assert "reft" not in chunk["choices"][0]
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == [f"I am {digests[name][:6]}." for name in ("tone", "tone", "mood", "mood")]


@pytest.mark.parametrize(
    ("models", "status", "param", "message"),
    [
        (["tone", "nobody"], 404, "reft.models[1]", "nobody"),
        (["tone@9"], 404, "reft.models[0]", "tone@9"),
        ([], 400, "reft.models", "at least 1 item"),
        (["tone", 3], 400, "reft.models.1", "a model's name, or an object"),
        ([{"strength": 1}], 400, "reft.models.0.model", "missing"),
        ([{"model": "tone", "strenght": 1}], 400, "reft.models.0.strenght", "not a parameter"),
        ([{"model": BASE, "strength": 1}], 400, "reft.models[0]", "the base model has no edits"),
        (["tone"] * 65, 400, "reft.models", "65 models', expected at most 64"),
    ],
)
def test_errors_name_the_model(
    server: Server, digests: object, models: object, status: int, param: str, message: str
) -> None:
    body = {"model": BASE, "prompt": "x", "reft": {"models": models}}
    answer = server.http.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error["message"].startswith(param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("model", "ok"), [(BASE, True), ("mood", True), ("tone", False), ("nobody", False)]
)
def test_model_is_the_base_or_one_of_them(
    server: Server, digests: object, model: str, ok: bool
) -> None:
    body = {"model": model, "prompt": "x", "reft": {"models": ["tone@1", "mood"]}}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.is_success == ok
    if not ok:
        assert answer.json()["error"]["param"] == "model"


def test_the_cap_is_a_setting(in_process: object, make_settings: object) -> None:
    assert Settings().max_fan_out == 64
    with in_process(max_fan_out=2) as server:  # type: ignore[operator]
        body = {"model": BASE, "prompt": "x", "reft": {"models": [BASE] * 3}}
        refused = server.http.post("/v1/completions", json=body)
        assert "at most 2" in refused.json()["error"]["message"]
        assert server.http.post(
            "/v1/completions", json=body | {"reft": {"models": [BASE] * 2}}
        ).is_success


@pytest.mark.parametrize(
    ("counts", "param"),
    [((2, 3, 2), None), ((2, 3, 3), "reft.models"), ((4, 2, 2), "prompt"), ((2, 2, 4), "n")],
)
def test_more_answers_than_the_engine_takes_in_are_refused(
    in_process: object, engine: FakeEngine, counts: tuple[int, int, int], param: str | None
) -> None:
    num_prompts, num_models, n = counts
    body = {"model": BASE, "prompt": ["x"] * num_prompts, "n": n}
    body |= {"reft": {"models": [BASE] * num_models}}
    with in_process(max_num_seqs=4, max_waiting=8) as server:  # type: ignore[operator]
        answer = server.http.post("/v1/completions", json=body)
    assert answer.is_success == (param is None)
    if param is not None:
        error = answer.json()["error"]
        assert error["param"] == param
        assert f"= {num_prompts * num_models * n}', expected at most 12" in error["message"]
        assert engine.submitted == []


def test_adapters_that_never_fit_together_are_refused_at_once(
    server: Server, engine: FakeEngine, digests: dict[str, str]
) -> None:
    residency = server.services.residency
    bytes_each = server.services.registry.current("tone").resident_bytes
    residency._budget_bytes = 2 * bytes_each
    body = {"model": BASE, "prompt": "x", "reft": {"models": ["tone", "tone@1"]}}
    assert server.http.post("/v1/completions", json=body).is_success
    body["reft"] = {"models": ["tone", "tone@1", "mood", BASE]}
    refused = server.http.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reft")
    assert f"at most {2 * bytes_each} bytes together" in refused.json()["error"]["message"]
    assert residency.num_references == 0


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (PromptTooLong("prompt: got 9, expected 8", field="prompt"), 400, "reft.models[1]"),
        (EngineOverloaded("the queue is full"), 429, None),
    ],
)
def test_one_that_the_engine_refuses_takes_the_others_back(
    server: Server,
    engine: FakeEngine,
    digests: object,
    error: Exception,
    status: int,
    param: str | None,
) -> None:
    engine.refuse_with, engine.refuse_after = error, 1
    body = {"model": BASE, "prompt": "x", "reft": {"models": ["tone", "mood", BASE]}}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
    assert engine.cancelled == [request.request_id for request in engine.submitted]
    assert server.services.residency.num_users(engine.loads[0]) == 0
    metrics = server.http.get("/metrics").text
    assert ended(metrics, "error") == 1.0


def test_one_that_cannot_be_loaded_is_named_and_the_others_are_given_back(
    server: Server, engine: FakeEngine, digests: dict[str, str]
) -> None:
    complete(server, model="tone")
    engine.load_failure = AdapterFileInvalid("file: damaged", field="file")
    body = {"model": BASE, "prompt": "x", "reft": {"models": ["tone", "mood"]}}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.json()["error"]["message"] == "reft.models[1]: file: damaged"
    assert engine.submitted[1:] == []
    assert server.services.residency.num_users(digests["tone"]) == 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("failure", "status", "param"),
    [
        (RequestFailed("decode failed"), 500, "reft.models[1]"),
        (DeadlineExceeded("the request did not end in time"), 504, None),
    ],
)
def test_one_that_fails_while_it_runs_ends_all(
    server: Server,
    engine: FakeEngine,
    digests: dict[str, str],
    streaming: bool,
    path: str,
    failure: ReftError,
    status: int,
    param: str | None,
) -> None:
    engine.fails = lambda request: request.adapters[:1] == (AdapterChoice(digests["mood"]),)
    engine.fail_after, engine.failure = 2, failure
    body = {"model": BASE, "max_tokens": 200, "ignore_eos": True, "stream": streaming}
    body |= {"messages": HELLO} if "chat" in path else {"prompt": "x"}
    answer = server.http.post(path, json=body | {"reft": {"models": ["tone", "mood", BASE]}})
    if streaming:
        assert answer.status_code == 200
        error = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == status
        error = answer.json()["error"]
    prefix = f"{param}: " if param else ""
    assert (error["message"], error["param"]) == (f"{prefix}{failure.message}", param)
    wait_until(lambda: engine.num_open == 0, "the other models to be cancelled")
    for digest in engine.loads:
        assert server.services.residency.num_users(digest) == 0
    metrics = server.http.get("/metrics").text
    assert ended(metrics, "error") == 3.0
    assert ended(metrics, "abort") == 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_client_that_leaves_cancels_every_model(
    live: Server, engine: FakeEngine, streaming: bool, num_steps: int
) -> None:
    names = ["tone", "mood"]
    users = [live.upload(name, make_adapter(i))["digest"] for i, name in enumerate(names)]
    engine.pause()
    engine.step(num_steps)
    reft = {"models": [*names, BASE]}
    with asking(live, model=BASE, n=2, stream=streaming, ignore_eos=True, reft=reft):
        wait_until(lambda: engine.num_tokens == 6 * num_steps, "the first tokens")
        wait_until(lambda: engine.num_open == 6, "all choices to reach the engine")
    wait_until(lambda: engine.num_open == 0, "all choices to be cancelled")
    residency = live.services.residency
    wait_until(lambda: not any(map(residency.num_users, users)), "the adapters' release")
    assert sorted(engine.cancelled) == sorted(request.request_id for request in engine.submitted)
    metrics = live.http.get("/metrics").text
    assert ended(metrics, "abort") == 6.0


def test_a_client_that_leaves_while_one_adapter_loads_gives_the_others_back(
    live: Server, engine: FakeEngine
) -> None:
    names = ["tone", "mood"]
    users = [live.upload(name, make_adapter(i))["digest"] for i, name in enumerate(names)]
    assert live.http.post("/v1/completions", json={"model": "tone", "prompt": "x"}).is_success
    engine.load_gate = threading.Event()
    residency = live.services.residency
    with asking(live, model=BASE, reft={"models": names}):
        wait_until(lambda: [*map(residency.num_users, users)] == [1, 1], "the load to begin")
    wait_until(lambda: not any(map(residency.num_users, users)), "the adapters' release")
    engine.load_gate.set()
    assert len(engine.submitted) == 1


def test_an_adapter_of_several_models_is_held_once(live: Server, engine: FakeEngine) -> None:
    digest = live.upload("tone", make_adapter(1))["digest"]
    engine.pause()
    models = ["tone", {"model": "tone", "strength": 2}, BASE]
    with asking(live, model=BASE, reft={"models": models}):
        wait_until(lambda: engine.num_open == 3, "all models to reach the engine")
        assert live.services.residency.num_users(digest) == 1
    wait_until(lambda: live.services.residency.num_users(digest) == 0, "the adapter's release")
    assert engine.loads == [digest]


def test_a_model_that_ends_at_once_is_in_the_stream(
    server: Server, engine: FakeEngine, digests: dict[str, str]
) -> None:
    engine.reply = lambda request: "" if request.adapters else "base"
    body = {"model": BASE, "prompt": "x", "stream": True, "reft": {"models": ["tone", BASE]}}
    body |= {"stream_options": {"include_usage": True}}
    chunks = events(server.http.post("/v1/completions", json=body))
    found = [chunk["choices"][0] for chunk in chunks[:-1]]
    (silent,) = [choice for choice in found if choice["index"] == 0]
    assert (silent["text"], silent["finish_reason"]) == ("", "stop")
    assert silent["reft"]["digest"] == digests["tone"]
    # Each ends with a stop token, which counts.
    assert chunks[-1]["usage"]["completion_tokens"] == 1 + 5


def test_prompt_log_probabilities_are_a_completions_business(
    server: Server, digests: object
) -> None:
    refused = ask(server, prompt_logprobs=1, reft={"models": ["tone"]})
    assert refused.json()["error"]["param"] == "prompt_logprobs"


def test_classification_asks_one_model(server: Server, digests: object) -> None:
    body = {"model": "tone", "input": "x", "labels": ["a", "b"], "reft": {"models": ["tone"]}}
    refused = server.http.post("/v1/classify", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reft.models"


def test_the_engine_computes_a_shared_beginning_once(tiny: Server) -> None:
    """The real engine: every answer is the reference's, and the prompt is read once."""
    model = tiny.services.engine.model
    files = [
        random_adapter_bytes(model, seed=seed, size=2.0, positions="l2", name=f"fan{seed}")
        for seed in range(5)
    ]
    names = [f"fan{seed}" for seed in range(5)]
    for name, data in zip(names, files, strict=True):
        tiny.upload(name, data)
    text = "The quick brown fox jumps over the lazy dog"
    before = tiny.services.engine.stats().prompt_tokens_total
    body = {"model": "tiny", "prompt": text, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    body |= {"reft": {"models": [*names, "tiny"]}, "logprobs": 0}
    answer = tiny.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    prompt = tuple(tiny.services.loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    vocabulary = Vocabulary(tiny.services.loaded.tokenizer)
    for choice, data in zip(answer.json()["choices"], [*files, None], strict=True):
        adapter = decode_adapter(data) if data is not None else None
        expected = reference_generate(make_tiny_model(), prompt, 4, adapter)
        assert choice["logprobs"]["tokens"] == [vocabulary.describe(t)[0] for t in expected]
    computed = tiny.services.engine.stats().prompt_tokens_total - before
    assert computed == len(prompt) + 5 * 2
    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == 5 * (len(prompt) - 2)


def test_log_probabilities_of_the_prompt_under_each_model(tiny: Server) -> None:
    data = random_adapter_bytes(
        tiny.services.engine.model, seed=1, size=2.0, positions="prompt", name="all-over"
    )
    tiny.upload("all-over", data)
    body = {"prompt": "hello", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    models = ["tiny", "all-over", {"model": "all-over", "strength": 0}]
    together = tiny.http.post(
        "/v1/completions", json=body | {"model": "tiny", "reft": {"models": models}}
    ).json()["choices"]
    alone = [
        tiny.http.post("/v1/completions", json=body | {"model": name}).json()["choices"][0]
        for name in ("tiny", "all-over")
    ]
    for mine, other in zip(together, [*alone, alone[0]], strict=True):
        assert mine["text"] == other["text"]
        found, expected = (c["logprobs"]["token_logprobs"][1:] for c in (mine, other))
        assert found == pytest.approx(expected, abs=1e-3)


def test_messages_are_needed_for_chat(server: Server) -> None:
    assert ask(server, messages=HELLO, reft={"models": [BASE]}).is_success
