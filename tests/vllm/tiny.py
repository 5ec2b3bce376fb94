"""A tiny random Llama that vLLM's CPU kernels take, adapters for it, and the right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from reft_core.adapter import Adapter, decode_adapter, encode_adapter
from reft_core.sites import ModelDescription, describe_model
from tests.factories import random_adapter_bytes, random_prompt, shift_adapter
from tests.reference.slow import reference_generate

BLOCK_TOKENS = 32
"""vLLM's CPU kernels know no smaller block."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "last": {"positions": "l1"},
    "untied": {"positions": "f3+l5", "tied": False, "method": "direft"},
    "prompt": {"positions": "prompt", "method": "red"},
    "long-tail": {"positions": "l40", "rank": 4},
    "bent": {"positions": "l7", "method": "lobireft"},
    "listed": {"positions": "0,3,-2", "layers": [1, 3], "method": "red"},
}
"""Each edits the block output, ReFT's place."""


@dataclass
class Job:
    """A prompt with the adapters it is to be answered under, by name, with their strengths."""

    prompt: tuple[int, ...]
    stack: tuple[tuple[str, float], ...] = ()
    max_tokens: int = 8


@dataclass
class TinyWorld:
    """The model, by vLLM to be read from a folder, and its adapters by name."""

    folder: Path
    model: PreTrainedModel
    description: ModelDescription
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def model_path(self) -> str:
        """Where vLLM finds the model."""
        return str(self.folder / "model")

    @property
    def spool(self) -> str:
        """A spool of this world alone."""
        return str(self.folder / "spool")

    def adapter(self, name: str) -> Adapter:
        """One adapter, read from its file."""
        return decode_adapter(self.files[name])

    def expected(self, job: Job) -> list[int]:
        """What the slow reference answers."""
        stack = [(self.adapter(name), strength) for name, strength in job.stack]
        return reference_generate(self.model, job.prompt, job.max_tokens, stack=stack)

    def extra_args(self, job: Job) -> dict[str, Any]:
        """How the job names its adapters to vLLM."""
        adapters = [
            {"digest": self.adapter(name).digest, "strength": strength}
            for name, strength in job.stack
        ]
        return {"reft": {"adapters": adapters}} if adapters else {}

    def params(self, job: Job) -> Any:
        """vLLM's sampling parameters of a job, greedy."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=job.max_tokens,
            ignore_eos=True,
            extra_args=self.extra_args(job),
            detokenize=False,
        )


def make_world(folder: Path) -> TinyWorld:
    """The tiny model in ``folder``, with :data:`ADAPTERS`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.6 if "embed" in name else 0.2)
    model.save_pretrained(folder / "model")
    words = {f"w{token}": token for token in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w2", pad_token="w0"
    ).save_pretrained(folder / "model")
    world = TinyWorld(folder, model, describe_model(model, "tiny-llama"))
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        world.files[name] = random_adapter_bytes(
            world.description, seed=seed, size=2.0, name=name, **options
        )
    return world


def mixed_jobs(num_rounds: int = 2) -> list[Job]:
    """Prompts around the edges of blocks and chunks, the base model and every adapter among them,
    neighbours sharing beginnings."""
    lengths = [1, 2, 5, 17, 31, 32, 33, 40, 64, 65, 70, 97]
    stacks: list[tuple[tuple[str, float], ...]] = [()]
    stacks += [((name, 1.0),) for name in ADAPTERS]
    stacks += [(("last", 0.5),), (("untied", 1.0), ("long-tail", -0.5))]
    jobs = []
    for round_ in range(num_rounds):
        for index in range(len(stacks) * 2):
            prompt = random_prompt(lengths[(index + round_) % len(lengths)], seed=index % 3)
            jobs.append(Job(prompt, stacks[index % len(stacks)]))
    return jobs


def tails_that_mislead(name: str) -> list[Job]:
    """A prompt, and longer ones that begin with it, under one adapter and the base model.

    The shorter one's last blocks hold edits at positions that the longer ones leave alone.
    """
    whole = random_prompt(200, seed=9)
    jobs = []
    for length in (64, 96, 100, 160, 200):
        jobs += [Job(whole[:length], ((name, 1.0),)), Job(whole[:length])]
    return jobs


def answers(llm: Any, world: TinyWorld, jobs: Sequence[Job]) -> list[list[int]]:
    """What vLLM answers to the jobs, all of them in one call."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(job.prompt)} for job in jobs],
        [world.params(job) for job in jobs],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def num_wrong(found: Sequence[Sequence[int]], world: TinyWorld, jobs: Sequence[Job]) -> int:
    """How many answers differ from the reference's."""
    wanted = [world.expected(job) for job in jobs]
    return sum(list(got) != want for got, want in zip(found, wanted, strict=True))


def start_llm(world: TinyWorld, *, reft: dict[str, Any] | None = None, **options: Any) -> Any:
    """A ``vllm.LLM`` of the tiny model: float32, chunks of 17 tokens, blocks of 32."""
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 17,
        "max_num_seqs": 8,
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "additional_config": {"reft": {"spool": world.spool, **(reft or {})}},
        "seed": 0,
    }
    return LLM(model=world.model_path, **{**settings, **options})


def load_all(llm: Any, world: TinyWorld) -> None:
    """Load every adapter of the world."""
    from reft_core.vllm.loading import load_adapter

    for data in world.files.values():
        load_adapter(llm, data)


def check_fails_alone(llm: Any, world: TinyWorld, digest: str) -> None:
    """Requests under an adapter that cannot be applied end in error, though the step in which they
    fail is their last; others are answered."""
    ends = [
        Job(random_prompt(40), max_tokens=8),
        Job(random_prompt(5)),
        Job(random_prompt(5), max_tokens=1),
    ]
    params = [world.params(job) for job in (*ends, ends[-1])]
    for failing in params:
        failing.extra_args = {"reft": {"adapters": [{"digest": digest}]}}
    params[-1].extra_args["reft"]["prompt_len"] = 3  # an answer to be scored follows
    params[-1].prompt_logprobs = 0
    good = Job(random_prompt(40, seed=1), (("last", 1.0),))
    jobs = [*ends, ends[-1], good]
    outputs = llm.generate(
        [{"prompt_token_ids": list(job.prompt)} for job in jobs],
        [*params, world.params(good)],
        use_tqdm=False,
    )
    *failed, fine = [output.outputs[0] for output in outputs]
    assert [(bad.finish_reason, list(bad.token_ids)) for bad in failed] == [("error", [])] * 4
    assert list(fine.token_ids) == world.expected(good)


def check_lost_file(llm: Any, world: TinyWorld) -> None:
    """:func:`check_fails_alone` with an adapter whose file is gone, where workers keep but one."""
    from reft_core.vllm.loading import load_adapter

    # Of the last layer, whose edits change no keys and values.
    data = random_adapter_bytes(world.description, seed=30, name="lost", positions="l3", layers=[3])
    digest = load_adapter(llm, data)
    load_adapter(llm, world.files["last"])
    (Path(world.spool) / f"{digest}.safetensors").unlink()
    check_fails_alone(llm, world, digest)


def check_overflow(llm: Any, world: TinyWorld) -> None:
    """:func:`check_fails_alone` with an adapter whose edits of the first layer are no numbers."""
    from reft_core.vllm.loading import load_adapter

    adapter = shift_adapter(world.description, shift=3e38, gain=3e38)
    check_fails_alone(llm, world, load_adapter(llm, encode_adapter(adapter.spec, adapter.edits)))
