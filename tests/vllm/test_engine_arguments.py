"""What the vLLM engine is told: our settings, arguments passed through, and one request."""

from __future__ import annotations

from typing import Any

import pytest

from reft_core.engine.config import EngineConfig
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.errors import InvalidRequest
from reft_core.loading import LoadedModel
from reft_core.vllm.arguments import VllmOptions, engine_args, vllm_config
from tests.factories import NoTokenizer
from tests.server.fakes import make_tokenizer
from tests.vllm.tiny import TinyWorld


def args_of(
    world: TinyWorld, config: EngineConfig | None = None, tokenizer: Any = None, **options: Any
) -> Any:
    loaded = LoadedModel(world.model, tokenizer, world.description)
    return engine_args(
        world.model_path,
        loaded,
        "float32",
        config or EngineConfig(max_model_len=512),
        VllmOptions(**options),
    )


def test_settings_become_vllms_arguments(world: TinyWorld) -> None:
    args = args_of(
        world,
        EngineConfig(max_model_len=64, max_num_seqs=3, prefix_cache_bytes=0, max_prefill_tokens=17),
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        data_parallel_size=4,
        distributed_executor_backend="ray",
        gpu_memory_utilization=0.5,
        extra={"block_size": 64},
    )
    assert (args.model, args.dtype, args.block_size) == (world.model_path, "float32", 64)
    assert (args.max_num_seqs, args.max_num_batched_tokens, args.max_model_len) == (3, 17, 65)
    assert args.enable_prefix_caching is False
    sizes = (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size)
    assert sizes == (2, 3, 4)
    assert (args.distributed_executor_backend, args.gpu_memory_utilization) == ("ray", 0.5)


@pytest.mark.parametrize(
    ("given", "reft"),
    [
        (None, {"resident_bytes": 4096}),
        ({"reft": {"look_interval_s": 1}}, {"resident_bytes": 4096, "look_interval_s": 1}),
        ({"reft": {"resident_bytes": 512}}, {"resident_bytes": 512}),
    ],
)
def test_the_servers_room_for_adapters_is_each_devices(
    world: TinyWorld, given: dict[str, Any] | None, reft: dict[str, int]
) -> None:
    rest = {"other": 1}
    extra = {} if given is None else {"additional_config": given | rest}
    args = args_of(world, resident_bytes=4096, extra=extra)
    assert args.additional_config == {"reft": reft} | (rest if given else {})


def test_grammars_are_for_models_with_a_fast_tokenizer(world: TinyWorld) -> None:
    args = args_of(world, tokenizer=make_tokenizer())
    assert args.skip_tokenizer_init is False
    assert args.structured_outputs_config == {"backend": "guidance"}
    assert args_of(world, tokenizer=NoTokenizer()).skip_tokenizer_init is True


def test_the_context_ends_where_the_models_does(world: TinyWorld) -> None:
    args = args_of(world, EngineConfig(max_model_len=100_000))
    assert args.max_model_len == world.description.max_positions


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"enforce_eagre": True},
            "vllm_args.enforce_eagre: no argument of vLLM's engine; did you mean 'enforce_eager'?",
        ),
        (
            {"max_num_seqs": 3},
            "vllm_args.max_num_seqs: got 3, expected it as the server's own setting max_num_seqs",
        ),
        (
            {"trust_remote_code": True},
            "vllm_args.trust_remote_code: got True, expected nothing, since code that comes with a "
            "model is never run",
        ),
        ({"_api_process_count": 2}, "vllm_args._api_process_count: no argument"),
    ],
)
def test_an_argument_that_is_none_is_named(
    world: TinyWorld, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        args_of(world, extra=extra)
    assert str(caught.value).startswith(message)


def test_a_setting_of_the_embedded_engine_is_refused(world: TinyWorld) -> None:
    with pytest.raises(InvalidRequest, match=r"kv_tokens: got 4096, expected nothing with engine"):
        args_of(world, EngineConfig(kv_tokens=4096))


def test_vllms_reason_for_refusing_a_value_is_told(world: TinyWorld) -> None:
    with pytest.raises(
        InvalidRequest, match=r"vllm_args: vLLM refuses its arguments: .*block_size"
    ):
        vllm_config(args_of(world, extra={"block_size": "many"}))


def test_a_request_becomes_vllms_parameters() -> None:
    from reft_core.vllm.sampling import to_vllm

    params = SamplingParams(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=11,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={3: 1.5},
        seed=-1,
        logprobs=2,
    )
    choice = AdapterChoice("ab" * 32, 0.5)
    made = to_vllm(Request("r", (5, 6), params, (choice,)), frozenset({9, 2}))
    for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert getattr(made, name) == getattr(params, name)
    for name in ("presence_penalty", "frequency_penalty", "logit_bias", "logprobs"):
        assert getattr(made, name) == getattr(params, name)
    assert made.seed == 2**64 - 1, "-1 means none to vLLM"
    assert (made.stop_token_ids, made.ignore_eos) == ([2, 9], True)
    assert made.detokenize is False
    assert made.extra_args == {"reft": {"adapters": [{"digest": "ab" * 32, "strength": 0.5}]}}


def test_what_is_only_read_asks_for_its_log_probabilities() -> None:
    from reft_core.vllm.sampling import prompt_of, to_vllm

    params = SamplingParams(max_tokens=2, logprobs=3, prompt_logprobs=1)
    scored = Request("r", (5, 6), params, completion=(7, 8))
    made = to_vllm(scored, frozenset())
    assert prompt_of(scored) == [5, 6, 7, 8]
    assert (made.max_tokens, made.logprobs, made.prompt_logprobs) == (1, None, 3)
    read = to_vllm(Request("r", (5,), SamplingParams(max_tokens=0)), frozenset())
    assert (read.max_tokens, read.prompt_logprobs) == (1, None)
