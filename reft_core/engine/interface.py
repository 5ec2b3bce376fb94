"""What an engine is to the rest of the project: requests in, tokens out.

The engine deals in token ids only. Text, templates and stop strings belong to its callers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from reft_core.adapter import Adapter
from reft_core.engine.constraint import Constraint
from reft_core.errors import InvalidRequest, ReftError
from reft_core.sites import ModelDescription
from reft_core.spec import AdapterSpec

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = 20
MAX_PRIORITY = 1_000_000
MAX_DEADLINE_S = 7 * 24 * 3600.0
_MAX_SEED = 2**63 - 1


class Range(NamedTuple):
    """The numbers that a field of :class:`SamplingParams` may hold."""

    low: float
    high: float
    whole: bool = False
    """Integers only."""
    open_low: bool = False
    """``low`` itself is left out."""

    def check(self, name: str, value: float) -> None:
        """Raise :class:`InvalidRequest` unless ``value`` is one of them."""
        # Written so that NaN fails too.
        low, high = self.low, self.high
        in_range = low < value <= high if self.open_low else low <= value <= high
        if not in_range or (self.whole and not isinstance(value, int)):
            kind = "a whole number" if self.whole else "a number"
            start = "above" if self.open_low else "from"
            up = "up " * self.open_low
            raise InvalidRequest.because(name, value, f"{kind} {start} {low} {up}to {high}")


RANGES: Mapping[str, Range] = {
    "max_tokens": Range(0, 1_000_000, whole=True),
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, open_low=True),
    "top_k": Range(0, 10_000_000, whole=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 10, open_low=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "logit_bias": Range(-100, 100),
    "seed": Range(-_MAX_SEED, _MAX_SEED, whole=True),
    "logprobs": Range(0, MAX_LOGPROBS, whole=True),
    "prompt_logprobs": Range(0, MAX_LOGPROBS, whole=True),
}
"""What each field may hold, in the order they are checked; of ``logit_bias``, each value."""
PRIORITIES = Range(-MAX_PRIORITY, MAX_PRIORITY, whole=True)


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Every value is checked on construction.

    Order of operations on a token's logits: logit bias, repetition penalty, presence and
    frequency penalties, the request's constraint, temperature, then top-k, top-p and min-p on
    the result. Reported log-probabilities are of the model's own distribution, before all of
    these.
    """

    max_tokens: int = 16
    """0 only reads the prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output; above 1 discourages."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """Same seed, prompt and adapter give the same tokens, whatever else is in the batch."""
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None reports nothing; n reports the chosen token's and the n likeliest."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, of which the first has none. Such a prompt is
    computed whole: the prefix cache knows no logits."""

    def __post_init__(self) -> None:
        for name, bounds in RANGES.items():
            value = getattr(self, name)
            if name == "logit_bias":
                for token, bias in self.logit_bias.items():
                    bounds.check(f"logit_bias[{token}]", bias)
            elif value is not None:
                bounds.check(name, value)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class AdapterChoice:
    """One adapter as a request asks for it."""

    digest: str
    """Of an adapter that was loaded with :meth:`Engine.load_adapter`."""
    strength: float | None = None
    """Δ is multiplied by it; None takes the adapter's own. 0 is exactly the base model."""
    subspaces: Mapping[str, float] = field(default_factory=dict)
    """Factors of the adapter's named subspaces; when any is named, the others are off."""
    source: tuple[int, ...] = ()
    """Source prompt of an interchange: its states, as the base model makes them, are put in
    place at the positions that the adapter's rule draws on both prompts."""


@dataclass(frozen=True)
class Request:
    """One prompt to complete, with any number of adapters."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    adapters: tuple[AdapterChoice, ...] = ()
    """Applied in order: at a site that several edit, each reads what the one before wrote."""
    completion: tuple[int, ...] = ()
    """Tokens to take in turn instead of choosing any, to learn their log-probabilities.
    Stop tokens among them end nothing, and of ``params`` only ``logprobs`` and
    ``prompt_logprobs`` count."""
    constraint: Constraint | None = None
    """The form of the answer. It belongs to this request from now on; when nothing may follow,
    the request ends with reason ``stop``."""
    priority: int = 0
    """Lower is more urgent: among its tenant's, admitted first, and the last to lose its slot."""
    tenant: str = ""
    """Slots are shared fairly between tenants and their adapters, and what one tenant's prompts
    leave in the prefix cache is not used for another's."""
    deadline_s: float | None = None
    """Seconds from submission after which it ends with :class:`DeadlineExceeded`."""

    def __post_init__(self) -> None:
        PRIORITIES.check("priority", self.priority)
        if self.deadline_s is not None:
            Range(0, MAX_DEADLINE_S, open_low=True).check("deadline_s", self.deadline_s)
        if self.completion and self.constraint is not None:
            raise InvalidRequest.because(
                "constraint", self.constraint, "none beside a given completion"
            )


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its natural-log probability under the model."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Token:
    """One generated token, or one of a prompt whose log-probabilities are wanted."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    rank: int | None = None
    """Place among all tokens by probability, from 1; of a prompt's tokens only."""


@dataclass(frozen=True)
class Timings:
    """Seconds a finished request spent, by stage."""

    queue_s: float
    """From submission to admission."""
    prefill_s: float
    """From admission to the first token."""
    decode_s: float
    """From the first token to the last."""


@dataclass(frozen=True)
class Output:
    """What happened to a request in one engine step.

    Each carries a token, except a last one that ends by cancellation or error, or because no
    token was wanted. The last has ``finish_reason`` and ``timings``; ``error`` is set only with
    reason ``error``. A stop token is counted and delivered like any other; callers that show
    text drop it, unless ``completes_constraint``.
    """

    request_id: str
    token: Token | None
    finish_reason: FinishReason | None = None
    error: ReftError | None = None
    timings: Timings | None = None
    num_cached_tokens: int = 0
    """Tokens of the prompt that were not computed for this request: the prefix cache knew them,
    or they were computed for another request that began in the same way."""
    completes_constraint: bool = False
    """Reason ``stop``, but by a token that is part of the answer: nothing may follow it."""
    prompt_logprobs: tuple[Token | None, ...] = ()
    """With the first output, if they were asked for: a token each, None for the first."""


@dataclass(frozen=True)
class Ticket:
    """Receipt of an accepted request."""

    request_id: str
    num_prompt_tokens: int
    num_edits: int
    """(layer, site, position) triples of the prompt that change, dead ones left out."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics. Counters only grow over the engine's life."""

    num_running: int
    num_waiting: int
    num_slots: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    num_resident_adapters: int
    resident_adapter_bytes: int
    prompt_tokens_total: int
    generated_tokens_total: int
    edits_applied_total: int
    prefill_steps_total: int
    decode_steps_total: int
    cached_tokens_total: int
    """Tokens that were taken from the prefix cache, or from a sequence that runs beside, instead
    of being computed."""
    cached_blocks: int
    preemptions_total: int
    free_cached_blocks: int
    max_cached_blocks: int
    """Blocks that the prefix cache has memory for: those held and those free."""
    num_decode_graphs: int = 0
    """CUDA graphs that decode steps are replayed from."""
    warm_up_s: float = 0.0
    """Seconds that recording them took at start."""
    foreign_tokens_total: int = 0
    """How many of ``cached_tokens_total`` requests with other adapters, or with none, had left."""
    kv_token_bytes: int = 0
    """Bytes that the keys and values of one token take."""
    block_tokens: int = 0
    """Tokens of a block of the prefix cache."""


OutputSink = Callable[[Output], None]
"""Receives a request's outputs, in order, on the engine's thread. Must not block or raise."""


class AdapterHost(Protocol):
    """A base model that runs on a thread of its own, and the adapters it can use.

    Every method may be called from any thread.
    """

    @property
    def model(self) -> ModelDescription:
        """The base model being served."""

    @property
    def max_model_len(self) -> int:
        """Most tokens a request may have, prompt and answer together."""

    @property
    def healthy(self) -> bool:
        """False once the engine can no longer run requests."""

    def load_adapter(self, adapter: Adapter) -> None:
        """Make an adapter usable by its digest; no-op if it already is.

        Raises :class:`AdapterMismatch` if it was made for another base model.
        """

    def unload_adapter(self, digest: str) -> None:
        """Take an adapter away from new requests; running ones keep it until they end."""

    def has_adapter(self, digest: str) -> bool:
        """Whether requests may name this digest now."""

    def adapter_spec(self, digest: str) -> AdapterSpec:
        """The spec of a loaded adapter. Raises :class:`InvalidRequest` if it is not loaded."""

    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step."""

    def start(self) -> None:
        """Start the engine's thread; requests submitted before wait for it."""

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those accepted; True if all ended in time."""

    def stop(self) -> None:
        """End the thread; requests still open get an :class:`EngineUnavailable` output."""


class Engine(AdapterHost, Protocol):
    """Runs many requests, each with its own adapter or none, in one continuous batch."""

    def submit(self, request: Request, sink: OutputSink) -> Ticket:
        """Accept a request; from now on ``sink`` gets tokens until a finish reason.

        Raises without calling ``sink``: :class:`InvalidRequest` (empty prompt, token outside
        the vocabulary, adapter not loaded), :class:`PromptTooLong`,
        :class:`EngineOverloaded`, :class:`EngineUnavailable`.
        """

    def together(self) -> AbstractContextManager[None]:
        """Requests that this thread submits while the context is open begin in one step.

        So what they have in common is computed once. Holds other callers up; keep it short.
        """

    def cancel(self, request_id: str) -> None:
        """End a request at the next step with reason ``cancelled``; no-op if it has ended."""
