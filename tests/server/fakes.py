"""Stand-ins for the model: an engine of scripted answers, a byte tokenizer, tiny adapters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from reft_core.adapter import Adapter, EditKey, check_fits, encode_adapter
from reft_core.edits import Edit
from reft_core.engine.admission import check_fits_context, check_not_empty
from reft_core.engine.choices import loaded_adapter
from reft_core.engine.interface import (
    EngineStats,
    FinishReason,
    Output,
    OutputSink,
    Request,
    Ticket,
    Timings,
    Token,
    TokenLogprob,
)
from reft_core.errors import EngineUnavailable, ReftError
from reft_core.loading import LoadedModel
from reft_core.sites import ModelDescription, describe_model
from reft_core.spec import AdapterSpec, PositionSpec, SiteSpec, TemplateSpec

MODEL = ModelDescription(
    name="tiny-base",
    architecture="llama",
    hidden_size=8,
    num_layers=2,
    vocab_size=260,
    fingerprint="ab" * 32,
    num_kv_heads=1,
    head_dim=8,
    max_positions=512,
    num_parameters=1234,
    sites={"block_output": (8, 8)},
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: a token a byte, three special ones, one merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    vocab["he"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def make_loaded() -> LoadedModel:
    """A loaded model of which only tokenizer and description are ever asked."""
    return LoadedModel(cast(PreTrainedModel, None), make_tokenizer(), MODEL)


def make_tiny_model() -> PreTrainedModel:
    """A random model over the byte tokenizer's tokens; the same at every call."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=make_tokenizer().eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.4)
    return model


def make_tiny_loaded() -> LoadedModel:
    """A tiny model that runs, with its tokenizer."""
    model = make_tiny_model()
    return LoadedModel(model, make_tokenizer(), describe_model(model, "tiny"))


def make_adapter(seed: int = 0, name: str = "tone", **changes: Any) -> bytes:
    """A valid adapter file for :data:`MODEL`; other seeds, other digests."""
    generator = torch.Generator().manual_seed(seed)
    layers, rank = (0, 1), 2
    fields: dict[str, Any] = {
        "name": name,
        "description": f"seed {seed}",
        "base": MODEL.to_base_spec(),
        "method": "direft",
        "positions": PositionSpec(rule="l2"),
        "sites": {"block_output": SiteSpec(layers=layers, rank=rank, parts=("down", "up", "bias"))},
    }
    spec = AdapterSpec(**(fields | changes))
    edits = {
        EditKey(layer, "block_output", 0): Edit(
            down=torch.randn(spec.base.hidden_size, rank, generator=generator),
            up=torch.randn(rank, spec.base.hidden_size, generator=generator),
            bias=torch.randn(rank, generator=generator),
        )
        for layer in layers
    }
    return encode_adapter(spec, edits)


BRACKETS = TemplateSpec(system="S[{content}]", user="U[{content}]", assistant="A[{content}]")


@dataclass
class _Running:
    request: Request
    sink: OutputSink
    script: list[int]
    num_sent: int = 0


@dataclass
class FakeEngine:
    """An engine whose answers are scripted and whose steps a test may hold back.

    ``reply`` makes an answer's text from the request; every step sends each running request
    its next token. After :meth:`pause`, steps happen only as :meth:`step` allows them.
    """

    tokenizer: PreTrainedTokenizerFast
    model: ModelDescription = MODEL
    max_model_len: int = 256
    reply: Callable[[Request], str | list[int]] = lambda request: (
        f"I am {request.adapters[0].digest[:6] if request.adapters else 'base'}."
    )
    ends_with_eos: bool = True
    fail_after: int | None = None
    """Tokens after which requests fail."""
    failure: ReftError | None = None
    """With what; None breaks the interface's promise to say so."""
    fails: Callable[[Request], bool] = lambda request: True
    """Which requests do."""
    refuse_with: Exception | None = None
    refuse_after: int = 0
    """Submissions accepted before ``refuse_with`` applies."""
    load_failure: Exception | None = None
    load_gate: threading.Event | None = None
    healthy: bool = True

    submitted: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    num_batches: int = 0
    """Times that requests were submitted together."""

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[str, _Running] = {}
        self._adapters: dict[str, Adapter] = {}
        self._allowed: float = float("inf")
        self._draining = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.num_tokens = 0

    # What tests use -------------------------------------------------------------------------

    def pause(self) -> None:
        with self._changed:
            self._allowed = 0

    def step(self, count: int = 1) -> None:
        with self._changed:
            self._allowed += count
            self._changed.notify_all()

    def resume(self) -> None:
        with self._changed:
            self._allowed = float("inf")
            self._changed.notify_all()

    @property
    def num_open(self) -> int:
        return len(self._running)

    @property
    def adapters(self) -> set[str]:
        return set(self._adapters)

    # The interface --------------------------------------------------------------------------

    def submit(self, request: Request, sink: OutputSink) -> Ticket:
        if self.refuse_with is not None and len(self.submitted) >= self.refuse_after:
            raise self.refuse_with
        if self._draining or self._stopping:
            raise EngineUnavailable("the engine takes no new requests")
        check_not_empty("prompt", request.prompt)
        check_fits_context(len(request.prompt), request.params.max_tokens, 0, self.max_model_len)
        num_edits = 0
        for choice in request.adapters:
            adapter = loaded_adapter(self._adapters, choice.digest)
            positions = sum(map(len, adapter.rule.resolve(len(request.prompt))))
            num_edits += positions * len(adapter.spec.sites["block_output"].layers)
        made = list(request.completion) or self.reply(request)
        if isinstance(made, str):
            made = self.tokenizer(made, add_special_tokens=False)["input_ids"]
        ends = self.ends_with_eos and not request.completion
        script = made + ([self.tokenizer.eos_token_id] if ends else [])
        with self._changed:
            self.submitted.append(request)
            self._running[request.request_id] = _Running(request, sink, script)
            self._changed.notify_all()
        return Ticket(request.request_id, len(request.prompt), num_edits)

    @contextmanager
    def together(self) -> Iterator[None]:
        self.num_batches += 1
        yield

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self.cancelled.append(request_id)
            running = self._running.get(request_id)
        if running is not None:
            self._end(running, None, "cancelled")

    def load_adapter(self, adapter: Adapter) -> None:
        if self.load_gate is not None:
            assert self.load_gate.wait(10)
        if self.load_failure is not None:
            raise self.load_failure
        check_fits(adapter.spec, self.model)
        self.loads.append(adapter.digest)
        self._adapters[adapter.digest] = adapter

    def unload_adapter(self, digest: str) -> None:
        self.unloads.append(digest)
        self._adapters.pop(digest, None)

    def has_adapter(self, digest: str) -> bool:
        return digest in self._adapters

    def adapter_spec(self, digest: str) -> AdapterSpec:
        return loaded_adapter(self._adapters, digest).spec

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=3,
            num_slots=4,
            kv_tokens_used=25,
            kv_tokens_capacity=100,
            num_resident_adapters=len(self._adapters),
            resident_adapter_bytes=sum(a.num_bytes for a in self._adapters.values()),
            prompt_tokens_total=sum(len(r.prompt) for r in self.submitted),
            generated_tokens_total=self.num_tokens,
            edits_applied_total=7,
            prefill_steps_total=len(self.submitted),
            decode_steps_total=self.num_tokens,
            cached_tokens_total=11,
            cached_blocks=2,
            preemptions_total=1,
            free_cached_blocks=3,
            max_cached_blocks=5,
            foreign_tokens_total=5,
            kv_token_bytes=64,
            block_tokens=16,
        )

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for running in list(self._running.values()):
            self._end(running, None, "error", EngineUnavailable("the engine was stopped"))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._rows())
                if self._stopping:
                    return
                rows = self._rows()
            for running in rows:
                self._advance(running)
            time.sleep(0)

    def _rows(self) -> list[_Running]:
        return [r for r in list(self._running.values()) if r.num_sent < self._allowed]

    def _advance(self, running: _Running) -> None:
        params = running.request.params
        is_due = self.fail_after is not None and running.num_sent >= self.fail_after
        if is_due and self.fails(running.request):
            self._end(running, None, "error", self.failure)
            return
        if params.max_tokens == 0:
            self._end(running, None, "length")
            return
        token_id = running.script[running.num_sent % len(running.script)]
        running.num_sent += 1
        self.num_tokens += 1
        token = Token(token_id)
        if params.logprobs is not None:
            top = tuple(
                TokenLogprob((token_id + i) % 256, -0.5 - i) for i in range(params.logprobs)
            )
            token = Token(token_id, -0.5, top)
        stops = params.stop_token_ids
        if not params.ignore_eos:
            stops = stops | {self.tokenizer.eos_token_id}
        if token_id in stops and not running.request.completion:
            self._end(running, token, "stop")
        elif running.num_sent == (len(running.request.completion) or params.max_tokens):
            self._end(running, token, "length")
        else:
            scores = _scores(running.request) if running.num_sent == 1 else ()
            running.sink(Output(running.request.request_id, token, prompt_logprobs=scores))

    def _end(
        self,
        running: _Running,
        token: Token | None,
        reason: FinishReason,
        error: ReftError | None = None,
    ) -> None:
        with self._changed:
            if self._running.pop(running.request.request_id, None) is None:
                return
        is_first = running.num_sent <= 1 and reason not in ("error", "cancelled")
        running.sink(
            Output(
                running.request.request_id,
                token,
                reason,
                error,
                Timings(0.01, 0.02, 0.03),
                prompt_logprobs=_scores(running.request) if is_first else (),
            )
        )
        with self._changed:
            self._changed.notify_all()


def _scores(request: Request) -> tuple[Token | None, ...]:
    """Token i of a prompt has log-probability -i and rank 2, behind its successors by id."""
    number = request.params.prompt_logprobs
    if number is None:
        return ()
    scored = (
        Token(
            token,
            -float(i),
            tuple(TokenLogprob((token + j + 1) % 256, -float(i) - j / 8) for j in range(number)),
            rank=2,
        )
        for i, token in enumerate(request.prompt[1:], start=1)
    )
    return (None, *scored)


def ended(metrics: str, reason: str) -> float:
    """How many choices a scrape says have ended for a reason."""
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            where = sample.labels.get("finished_reason")
            if sample.name == "reft_request_success_total" and where == reason:
                return sample.value
    raise AssertionError(f"no choices that ended for {reason}")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    """Return once ``condition`` holds; fail the test if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for: {what}"
        time.sleep(0.005)
