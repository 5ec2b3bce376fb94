"""Exactness, block keys, failures and run-time loading, with all of vLLM in this process.

So a test can look into its scheduler and its worker, and take a part of the plugin away.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest

from reft_core.adapter import encode_adapter
from reft_core.errors import AdapterError, AdapterMismatch, AdapterNotFound, UnsupportedFeature
from tests.factories import random_adapter_bytes, random_prompt, shift_adapter
from tests.reft_core.vllm.test_guard import GOOD
from tests.vllm.tiny import (
    ADAPTERS,
    BLOCK_TOKENS,
    Job,
    TinyWorld,
    answers,
    check_lost_file,
    check_overflow,
    load_all,
    mixed_jobs,
    num_wrong,
    start_llm,
    tails_that_mislead,
)

SITES = (
    "block_output",
    "attn_output",
    "mlp_output",
    "heads",
    "linear:self_attn.q_proj",
    "linear:self_attn.v_proj",
    "linear:self_attn.o_proj",
    "linear:mlp.up_proj",
    "linear:mlp.down_proj",
)


@pytest.fixture(scope="module")
def llm(world: TinyWorld) -> Iterator[Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = start_llm(world, reft={"sites": list(SITES)}, max_model_len=1200)
    load_all(llm, world)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def _no_cached_blocks(llm: Any) -> None:
    llm.reset_prefix_cache()


def store_of(llm: Any) -> Any:
    """The worker's store."""
    from reft_core.vllm.worker import armed

    core = llm.llm_engine.engine_core.engine_core
    return armed(core.model_executor.driver_worker.worker.model_runner).store


def refused(message: str) -> Any:
    """A context in which vLLM tells a client that its request is wrong."""
    from vllm.exceptions import VLLMValidationError

    return pytest.raises(VLLMValidationError, match=message)


def run_staggered(llm: Any, world: TinyWorld, jobs: Sequence[Job], every: int) -> list[list[int]]:
    """Answers to jobs that arrive one by one, ``every`` so many steps."""
    engine, found = llm.llm_engine, {}
    waiting = list(enumerate(jobs))
    step = 0
    while waiting or engine.has_unfinished_requests():
        if waiting and step % every == 0:
            number, job = waiting.pop(0)
            engine.add_request(
                str(number), {"prompt_token_ids": list(job.prompt)}, world.params(job)
            )
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
    return [found[number] for number in range(len(jobs))]


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_changes_answers(world: TinyWorld, name: str) -> None:
    prompts = [random_prompt(length, seed=length) for length in (20, 32, 70)]
    found = [(world.expected(Job(p)), world.expected(Job(p, ((name, 1.0),)))) for p in prompts]
    assert any(base != edited for base, edited in found)


def test_mixed_batches_in_chunks_twice_over_the_prefix_cache(llm: Any, world: TinyWorld) -> None:
    jobs = mixed_jobs()
    assert num_wrong(answers(llm, world, jobs), world, jobs) == 0
    assert num_wrong(answers(llm, world, jobs), world, jobs) == 0


@pytest.mark.parametrize("every", [1, 3])
def test_staggered_arrivals(llm: Any, world: TinyWorld, every: int) -> None:
    jobs = mixed_jobs()
    assert num_wrong(run_staggered(llm, world, jobs, every), world, jobs) == 0


def test_a_prompts_tail_is_not_taken_for_a_longer_prompts_middle(
    llm: Any, world: TinyWorld
) -> None:
    jobs = tails_that_mislead("long-tail")
    found = [answers(llm, world, [job])[0] for job in jobs]
    assert num_wrong(found, world, jobs) == 0


def test_without_keys_answers_are_wrong(
    llm: Any, world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_core.vllm.keys.block_keys", lambda runs, start, end: [])
    jobs = tails_that_mislead("long-tail")
    found = [answers(llm, world, [job])[0] for job in jobs]
    assert num_wrong(found, world, jobs) > 0


def test_with_keys_of_the_adapter_alone_answers_are_wrong(
    llm: Any, world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_adapter(runs: Any, start: int, end: int) -> list[tuple[str, str]]:
        return [("reft", mark) for _, _, mark in list(runs)[:1]]

    monkeypatch.setattr("reft_core.vllm.keys.block_keys", of_adapter)
    jobs = tails_that_mislead("long-tail")
    found = [answers(llm, world, [job])[0] for job in jobs]
    assert num_wrong(found, world, jobs) > 0


def test_suffix_only_adapters_share_all_before_the_suffix(llm: Any, world: TinyWorld) -> None:
    from reft_core.vllm.loading import load_adapter

    prompt = random_prompt(1000, seed=4)
    cached = []
    for seed in range(16):
        data = random_adapter_bytes(world.description, seed=seed, name=f"s{seed}", positions="l4")
        digest = load_adapter(llm, data)
        params = world.params(Job(prompt, max_tokens=1))
        params.extra_args = {"reft": {"adapters": [{"digest": digest}]}}
        (output,) = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
        cached.append(output.num_cached_tokens)
    shareable = (len(prompt) - 4) // BLOCK_TOKENS * BLOCK_TOKENS
    assert cached == [0] + 15 * [shareable]
    hit_rate = sum(cached) / (len(cached) * len(prompt))
    print(f"hit rate of 16 suffix-only adapters on one 1,000-token prompt: {hit_rate:.3f}")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("loreft", {"sites": ("attn_output", "mlp_output")}),
        ("loreft", {"sites": ("heads",), "rank": 4}),
        ("lora", {"sites": SITES[4:], "phase": "prompt"}),
        ("scaled_parallel_adapter", {"phase": "prompt", "activation": "relu"}),
        ("series_adapter", {"phase": "prompt"}),
        ("consreft", {}),
        ("noreft", {}),
        ("steering", {}),
        ("bitfit", {"sites": ("linear:mlp.down_proj",), "phase": "prompt"}),
    ],
)
def test_other_sites_and_methods(
    llm: Any, world: TinyWorld, method: str, options: dict[str, Any]
) -> None:
    from reft_core.vllm.loading import load_adapter

    data = random_adapter_bytes(
        world.description,
        seed=3,
        size=2.0,
        method=method,
        positions="f2+l9",
        name=method,
        **options,
    )
    there = replace(world, files={**world.files, "this": data})
    load_adapter(llm, data)
    jobs = [
        Job(random_prompt(n, seed=1), stack) for n in (9, 40) for stack in ((("this", 1.0),), ())
    ]
    assert num_wrong(answers(llm, there, jobs), there, jobs) == 0
    assert there.expected(jobs[0]) != there.expected(jobs[1])


def test_prompt_logprobs_see_last_layer_edits(llm: Any, world: TinyWorld) -> None:
    from tests.reference.slow import reference_logits

    prompt = random_prompt(30, seed=2)
    params = world.params(Job(prompt, (("prompt", 1.0),), max_tokens=1))
    params.prompt_logprobs = 1
    (output,) = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
    logits = reference_logits(world.model, list(prompt), len(prompt), world.adapter("prompt"))
    wanted = logits.log_softmax(-1)
    for place in range(1, len(prompt)):
        found = output.prompt_logprobs[place][prompt[place]].logprob
        assert found == pytest.approx(float(wanted[place - 1, prompt[place]]), abs=1e-3)


def test_subspaces(llm: Any, world: TinyWorld) -> None:
    from reft_core.adapter import decode_adapter
    from reft_core.vllm.loading import load_adapter
    from tests.reference.slow import reference_generate

    data = random_adapter_bytes(
        world.description,
        seed=8,
        size=2.0,
        rank=4,
        positions="l6",
        subspaces={"a": (0, 1), "b": (2, 3)},
    )
    adapter = decode_adapter(data)
    digest = load_adapter(llm, data)
    edits = {
        key: edit.scale_ranks(edit.up.new_tensor([2.0, 2.0, 0, 0]))
        for key, edit in adapter.edits.items()
    }
    prompt = random_prompt(50, seed=5)
    params = world.params(Job(prompt))
    params.extra_args = {"reft": {"adapters": [{"digest": digest, "subspaces": {"a": 2.0}}]}}
    (output,) = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
    wanted = reference_generate(world.model, prompt, 8, replace(adapter, edits=edits))
    assert list(output.outputs[0].token_ids) == wanted


def test_adapters_come_and_go_while_requests_run(llm: Any, world: TinyWorld) -> None:
    """An old version goes and a new one of the same name comes, in the middle of a prefill."""
    from reft_core.vllm.loading import load_adapter, unload_adapter

    versions = [
        random_adapter_bytes(world.description, seed=s, size=2.0, name="news", positions="f9+l9")
        for s in (20, 21)
    ]
    there = replace(world, files={**world.files, "old": versions[0], "new": versions[1]})
    old = load_adapter(llm, versions[0])
    job = Job(random_prompt(100, seed=6), (("old", 1.0),))
    engine = llm.llm_engine
    engine.add_request("0", {"prompt_token_ids": list(job.prompt)}, there.params(job))
    engine.step()
    engine.step()
    unload_adapter(llm, old)
    new = load_adapter(llm, versions[1])
    assert old not in store_of(llm).held()
    assert new in store_of(llm).held()
    with refused(old):
        engine.add_request("1", {"prompt_token_ids": [5, 6, 7]}, there.params(job))
    other = replace(job, stack=(("new", 1.0),))
    engine.add_request("2", {"prompt_token_ids": list(job.prompt)}, there.params(other))
    found = {}
    while engine.has_unfinished_requests():
        found |= {o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
    assert found == {"0": there.expected(job), "2": there.expected(other)}


def test_a_thousand_adapters_under_a_small_budget(
    llm: Any, world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reft_core.vllm.loading import load_adapter, unload_adapter

    store = store_of(llm)
    monkeypatch.setattr(store, "_budget_bytes", 20_000)
    files = [
        random_adapter_bytes(world.description, seed=s, size=2.0, name=f"n{s}", rank=1, layers=[1])
        for s in range(1000)
    ]
    digests = [load_adapter(llm, data) for data in files]
    assert set(digests) <= set(store.held())
    assert 0 < store.resident_bytes <= 20_000
    names = [f"n{seed}" for seed in (0, 500, 999, 0)]
    there = replace(world, files={f"n{s}": files[s] for s in (0, 500, 999)})
    jobs = [Job(random_prompt(20, seed=7), ((name, 1.0),)) for name in names]
    assert num_wrong(answers(llm, there, jobs), there, jobs) == 0
    assert store.resident_bytes <= 20_000
    for digest in digests:
        unload_adapter(llm, digest)
    assert not set(digests) & set(store.held())


def test_a_lost_file_fails_its_requests_alone(
    llm: Any, world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_of(llm), "_budget_bytes", 0)
    check_lost_file(llm, world)


def test_an_adapter_that_overflows_fails_its_requests_alone(llm: Any, world: TinyWorld) -> None:
    check_overflow(llm, world)
    jobs = mixed_jobs(1)
    assert num_wrong(answers(llm, world, jobs), world, jobs) == 0


def test_who_reads_a_failing_block_in_its_step_fails_too(llm: Any, world: TinyWorld) -> None:
    """The second prompt begins with the first, whose one block it finds cached while it is made."""
    from reft_core.vllm.loading import load_adapter

    adapter = shift_adapter(world.description, shift=3e38, gain=3e38, positions="20")
    digest = load_adapter(llm, encode_adapter(adapter.spec, adapter.edits))
    whole = random_prompt(BLOCK_TOKENS + 1, seed=3)
    jobs = [Job(whole[:-1]), Job(whole), Job(whole, (("last", 1.0),))]
    params = [world.params(job) for job in jobs]
    for failing in params[:2]:
        failing.extra_args = {"reft": {"adapters": [{"digest": digest}]}}
    *failed, fine = llm.generate(
        [{"prompt_token_ids": list(job.prompt)} for job in jobs], params, use_tqdm=False
    )
    assert [output.num_cached_tokens for output in failed] == [0, BLOCK_TOKENS]
    assert [output.outputs[0].finish_reason for output in failed] == ["error", "error"]
    assert list(fine.outputs[0].token_ids) == world.expected(jobs[2])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nobody", "nobody"),
        ("0" * 64, "known digest"),
        ("{not json", "reft"),
        ('{"adapters": [{"name": "last", "digest": 3}]}', "digest"),
        ('{"adapters": [{"name": "last", "strenght": 3}]}', "strenght"),
        ({"adapters": [{"name": "last", "strength": 1e9}]}, "strength"),
        ({"adapters": [{"name": "last", "subspaces": {"x": 1}}]}, "subspaces"),
        ({"adapters": [{"name": "last"}] * 17}, "adapters"),
    ],
)
def test_bad_requests_are_refused_at_the_door(llm: Any, asked: Any, message: str) -> None:
    from vllm import SamplingParams

    with refused(message):
        llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(extra_args={"reft": asked}))
    assert not llm.llm_engine.has_unfinished_requests()


def test_nobody_writes_the_admitted_form(llm: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(extra_args={"reft_admitted": {"uses": [], "runs": []}})
    with refused("reft_admitted"):
        llm.generate([{"prompt_token_ids": [5, 6]}], params)


def test_names_and_json_over_http_mean_the_same(llm: Any, world: TinyWorld) -> None:
    job = Job(random_prompt(21, seed=3), (("last", 1.0),))
    for asked in ("last", world.adapter("last").digest, '{"adapters": [{"name": "last"}]}'):
        params = world.params(job)
        params.extra_args = {"reft": asked}
        (output,) = llm.generate([{"prompt_token_ids": list(job.prompt)}], params, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == world.expected(job)


def test_bad_adapters_are_refused_before_any_worker_sees_them(llm: Any, world: TinyWorld) -> None:
    from reft_core.vllm.loading import load_adapter

    wider = replace(world.description, hidden_size=65)
    generated = random_adapter_bytes(world.description, method="lora", phase="all", sites=SITES[4:])
    unarmed = random_adapter_bytes(
        world.description, method="lora", phase="prompt", sites=("linear:self_attn.k_proj",)
    )
    held = store_of(llm).held()
    with pytest.raises(AdapterMismatch, match="hidden_size"):
        load_adapter(llm, random_adapter_bytes(wider))
    with pytest.raises(UnsupportedFeature, match="embedded engine"):
        load_adapter(llm, generated)
    with pytest.raises(UnsupportedFeature, match=r"linear:self_attn\.k_proj"):
        load_adapter(llm, unarmed)
    with pytest.raises(AdapterError):
        load_adapter(llm, world.files["last"][:-1])
    assert store_of(llm).held() == held


def test_workers_refuse_too_without_raising(llm: Any, world: TinyWorld) -> None:
    from reft_core.vllm.worker import REFUSED

    digest = world.adapter("last").digest
    (answer,) = llm.collective_rpc("reft_load", args=(b"nothing", digest))
    assert answer.startswith(REFUSED)


def test_a_second_load_changes_nothing(llm: Any, world: TinyWorld) -> None:
    from reft_core.vllm.loading import load_adapter

    store = store_of(llm)
    before = []
    for _ in range(2):
        load_adapter(llm, world.files["last"])
        before.append((store.held(), store.resident_bytes))
    assert before[0] == before[1]
    assert world.adapter("last").digest in before[0][0]


def test_an_unloaded_adapter_is_not_found(llm: Any, world: TinyWorld) -> None:
    from reft_core.vllm.admission import catalog_of
    from reft_core.vllm.loading import load_adapter, unload_adapter

    data = random_adapter_bytes(world.description, seed=40, name="gone")
    digest = load_adapter(llm, data)
    assert catalog_of(llm.llm_engine).names()["gone"] == digest
    unload_adapter(llm, digest)
    unload_adapter(llm, digest)
    with pytest.raises(AdapterNotFound, match="gone"):
        catalog_of(llm.llm_engine).resolve("gone")
    assert load_adapter(llm, data) == digest


def test_registering_again_changes_nothing(llm: Any) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from reft_core.vllm.plugin import register

    before = dict(vars(GPUModelRunner))
    register()
    assert dict(vars(GPUModelRunner)) == before


def test_another_release_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from reft_core.vllm.plugin import register

    monkeypatch.setattr("vllm.version.__version__", "0.33.1")
    with pytest.raises(UnsupportedFeature, match=r"0\.33\.1"):
        register()


def test_what_is_not_found_in_vllm_is_named() -> None:
    from reft_core.vllm.plugin import _wrap

    with pytest.raises(RuntimeError, match="GPUModelRunner"):
        _wrap("vllm.v1.worker.gpu_model_runner:GPUModelRunner.gone", lambda found: found)


@pytest.mark.parametrize("path", GOOD)
def test_vllm_has_the_settings_that_are_checked(llm: Any, path: str) -> None:
    attrgetter(path)(llm.llm_engine.vllm_config)


def test_what_no_front_end_admitted_is_refused_by_the_core(
    llm: Any, world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a front end without the plugin, which leaves the adapters as they were asked for."""
    from vllm.v1.engine.input_processor import InputProcessor

    job = Job(random_prompt(5), (("last", 1.0),))
    with monkeypatch.context() as unarmed:
        unarmed.setattr(InputProcessor, "process_inputs", InputProcessor.process_inputs.__wrapped__)
        with pytest.raises(UnsupportedFeature, match="not admitted"):
            llm.generate([{"prompt_token_ids": list(job.prompt)}], world.params(job))
    llm.llm_engine.output_processor.abort_requests(
        list(llm.llm_engine.output_processor.request_states), internal=True
    )
    assert answers(llm, world, [job]) == [world.expected(job)]


@pytest.mark.parametrize("nothing", [None, {"adapters": []}])
def test_no_adapters_are_the_base_model(llm: Any, world: TinyWorld, nothing: Any) -> None:
    job = Job(random_prompt(5))
    params = world.params(job)
    params.extra_args = {"reft": nothing}
    (output,) = llm.generate([{"prompt_token_ids": list(job.prompt)}], params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == world.expected(job)


@pytest.mark.parametrize(
    ("statuses", "message"),
    [([], "in every worker"), ([{"num_sites": 4}, {"num_sites": 0}], "no layer")],
)
def test_an_engine_core_whose_workers_are_not_armed_does_not_start(
    statuses: list[dict[str, int]], message: str
) -> None:
    from reft_core.vllm.startup import checking_workers

    class Core:
        def __init__(self) -> None:
            self.has_begun = True

        def collective_rpc(self, method: str) -> list[dict[str, int]]:
            assert self.has_begun
            if not statuses:
                raise AttributeError(method)
            return statuses

    with pytest.raises(UnsupportedFeature, match=message):
        checking_workers(Core.__init__)(Core())


def test_an_engine_core_that_is_not_armed_is_refused(llm: Any) -> None:
    import msgspec
    from vllm.v1.engine.core import EngineCoreProc

    from reft_core.vllm.startup import checking_core

    core = SimpleNamespace(
        vllm_config=llm.llm_engine.vllm_config,
        scheduler=llm.llm_engine.engine_core.engine_core.scheduler,
        frontend_stats_publish_address=None,
        engine_index=0,
    )
    taken = []
    apply = checking_core(lambda client, payload: taken.append(payload))
    armed, unarmed = (
        msgspec.msgpack.encode(make(core))
        for make in (
            EngineCoreProc._make_ready_response,
            EngineCoreProc._make_ready_response.__wrapped__,
        )
    )
    apply(None, armed)
    with pytest.raises(UnsupportedFeature, match="not armed"):
        apply(None, unarmed)
    assert taken == [armed]
