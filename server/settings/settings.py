"""Every setting of the server, from arguments, ``REFT_*`` variables or defaults.

The only module that reads the environment. It imports neither torch nor the engine, so the
command line stays quick; both are imported where a method needs them.
"""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from server.settings.arguments import (
    check_arguments,
    parse_argument,
    shown_arguments,
    split_arguments,
)

if TYPE_CHECKING:
    from reft_core.engine.config import EngineConfig
    from reft_core.grammar import GrammarLimits
    from reft_core.vllm.arguments import VllmOptions

MIB = 1024 * 1024
CLIENT_VARIABLES = frozenset({"REFT_URL", "REFT_CONFIG", "REFT_TENANT", "REFT_DATA"})
"""What commands and benchmarks read beside the settings."""
_OF_VLLM = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "distributed_executor_backend",
    "gpu_memory_utilization",
    "vllm_args",
)
_OF_EMBEDDED = ("device", "forward", "num_threads", "kv_tokens")


class Settings(BaseSettings):
    """Settings of one server process; immutable. An unknown argument is refused.

    Precedence: constructor arguments, then ``REFT_<FIELD>`` variables, then the defaults.
    :mod:`server.settings.sources` puts a file below the variables.
    """

    model_config = SettingsConfigDict(
        env_prefix="REFT_",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,  # a refused key must not end up in a log
    )

    model: str = Field(default="demo", description="hub id, folder, or 'demo'")
    engine: Literal["embedded", "vllm"] = Field(
        default="embedded",
        description="embedded: our own, on one device; vllm: vLLM, on many devices and nodes",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on a CPU, bfloat16 on a GPU"
    )
    device: str = Field(default="auto", description="auto: cuda where there is one, else cpu")
    forward: Literal["auto", "torch", "transformers"] = Field(
        default="auto",
        description="auto: packed weights and compiled loops where they help, twice the memory",
    )
    cuda_graphs: bool = Field(default=True, description="on a GPU, decode by recorded graphs")
    num_threads: int | None = Field(default=None, ge=1, description="none: torch's choice")
    cache_dir: Path | None = Field(default=None, description="derived files; none: ~/.cache")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free one")
    api_key: SecretStr | None = Field(
        default=None, min_length=8, description="a user key beside those of the table of keys"
    )
    admin_key: SecretStr | None = Field(
        default=None, min_length=16, description="an admin key beside those of the table"
    )
    require_keys: bool = Field(
        default=False, description="need a key on loopback too, also before the first user key"
    )
    metrics_public: bool | None = Field(
        default=None,
        description="/metrics without a key; none: on loopback, unless keys are required there",
    )
    key_cache_s: float = Field(
        default=5.0, ge=0, le=60, description="a revoked key may work for so long"
    )
    key_requests_per_minute: int = Field(
        default=6000, ge=0, description="of a key that says nothing else; 0: no limit"
    )
    key_tokens_per_minute: int = Field(
        default=6_000_000, ge=0, description="prompts and answers, likewise; 0: no limit"
    )
    key_max_concurrency: int = Field(
        default=1024, ge=0, description="requests at once, likewise; 0: no limit"
    )

    data_dir: Path = Field(default=Path("data"), description="catalog and adapter files")
    database_url: SecretStr | None = Field(
        default=None, description="postgresql://… or sqlite:///…; none: SQLite in data_dir"
    )
    blob_url: str | None = Field(
        default=None, description="adapter files, such as s3://bucket/prefix; none: in data_dir"
    )
    blob_options: SecretStr = Field(
        default=SecretStr("{}"),
        description='JSON object of the store\'s options, such as {"endpoint_url": "https://…"}',
    )
    blob_cache_bytes: int = Field(
        default=4096 * MIB, ge=0, description="files of a remote store kept in data_dir"
    )
    delete_grace_s: float = Field(
        default=30.0, ge=0, le=86400, description="a deleted adapter's file is kept for so long"
    )
    signatures: Literal["off", "if given", "required"] = Field(
        default="off", description="of uploads, by OpenSSF model-signing (header X-Model-Signature)"
    )
    signing_public_key: Path | None = Field(
        default=None, description="PEM file of the key that signatures are checked with"
    )
    registry_poll_s: float = Field(
        default=2.0, gt=0, le=60, description="what other servers changed is noticed within it"
    )
    adapters: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(),
        description="adapter files, folders of them or hub ids, registered at start under the "
        f"name in their spec; in the environment separated by '{os.pathsep}'",
    )

    max_model_len: int = Field(default=2048, ge=2, description="prompt and answer, in tokens")
    max_num_seqs: int = Field(default=16, ge=1, description="requests decoded together")
    max_waiting: int = Field(default=1024, ge=1, description="queued requests; beyond: 429")
    max_waiting_tokens: int = Field(
        default=256 * 1024, ge=1, description="while so many prompt tokens are queued: 429"
    )
    max_prefill_tokens: int = Field(default=512, ge=1, description="prompt tokens a step")
    kv_tokens: int | None = Field(
        default=None, ge=2, description="tokens of all running requests; none: as slots allow"
    )
    prefix_cache_bytes: int = Field(
        default=256 * MIB, ge=0, description="keys and values of prompts seen before; 0: none"
    )
    adapter_memory_bytes: int = Field(default=1024 * MIB, ge=MIB, description="loaded adapters")
    adapter_wait_s: float = Field(
        default=10.0, ge=0, le=3600, description="wait for room among them; beyond: 429"
    )
    pinned_adapters: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="names of adapters that stay loaded; in the environment separated by commas",
    )

    tensor_parallel_size: int = Field(
        default=1, ge=1, description="engine vllm: devices that every layer is split over"
    )
    pipeline_parallel_size: int = Field(
        default=1, ge=1, description="engine vllm: stages that the layers are split over"
    )
    data_parallel_size: int = Field(
        default=1, ge=1, description="engine vllm: copies of the model, each on its own devices"
    )
    distributed_executor_backend: Literal["mp", "ray"] | None = Field(
        default=None,
        description="engine vllm: mp on one node, ray on many; none: vLLM's choice",
    )
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="engine vllm: share of each GPU's memory it takes"
    )
    vllm_args: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="engine vllm: further arguments of its engine, as name=value with a value in "
        "JSON; in the environment one JSON object",
    )

    request_timeout_s: float = Field(
        default=600.0, gt=0, le=604800, description="a request that takes longer ends with a 504"
    )
    max_body_bytes: int = Field(
        default=2 * MIB, ge=1024, description="a JSON request body; beyond: 413"
    )
    body_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="time for a JSON body to arrive; beyond: 408"
    )
    upload_timeout_s: float = Field(
        default=600.0, gt=0, le=86400, description="time for an adapter file to arrive; beyond: 408"
    )
    max_connections: int = Field(
        default=2048, ge=1, description="open at once, health checks beside; beyond: 503"
    )
    keep_alive_timeout_s: int = Field(
        default=65, ge=1, le=3600, description="an idle connection is closed after it"
    )
    header_timeout_s: float = Field(
        default=15.0, gt=0, le=600, description="time for a request's headers; beyond: 408"
    )
    max_header_bytes: int = Field(
        default=64 * 1024,
        ge=1024,
        description="a request's headers; beyond: 431, unless they end in the read (of at most "
        "256 KiB) that passes it",
    )
    slow_reader_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="a client that leaves a full buffer unread for so long is cut off, and its "
        "requests are cancelled",
    )
    send_buffer_bytes: int = Field(
        default=64 * 1024, ge=1024, description="unread answer of one connection before it is full"
    )
    max_adapter_bytes: int = Field(default=64 * MIB, ge=1024, description="one adapter file")
    allow_inline_adapters: bool = Field(
        default=False, description="take adapters that requests bring along (reft.inline)"
    )
    max_inline_adapter_bytes: int = Field(
        default=MIB, ge=1024, description="one of those, before it is base64"
    )
    adapter_load_dir: Path | None = Field(
        default=None,
        description="folder below which /v1/load_adapter and /v1/load_lora_adapter find files; "
        "none: they load nothing",
    )
    max_fan_out: int = Field(
        default=64, ge=1, le=1024, description="models that one request may ask at once"
    )
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="of each prompt; none: as the context allows"
    )
    max_answer_tokens: int | None = Field(
        default=None,
        ge=1,
        description="of each answer, asked as max_tokens; none: as the context allows",
    )
    max_logprobs: int = Field(
        default=20, ge=0, le=20, description="likeliest tokens reported in the place of each"
    )
    max_prompt_logprobs: int = Field(
        default=256 * 1024,
        ge=1,
        description="log-probabilities of prompts in one answer, over all prompts, models and "
        "choices: of each token, and of the likeliest in its place",
    )
    max_n: int = Field(default=8, ge=1, le=128, description="choices a request")
    max_prompts: int = Field(default=64, ge=1, le=1024, description="prompts a completion")
    max_stop: int = Field(default=16, ge=1, le=64, description="stop strings a request")
    max_stop_chars: int = Field(default=256, ge=1, le=1024, description="length of each")
    max_grammar_bytes: int = Field(
        default=64 * 1024, ge=64, le=MIB, description="a schema, regex or grammar for answers"
    )
    max_grammars: int = Field(default=64, ge=1, le=4096, description="compiled grammars kept")
    grammar_timeout_s: float = Field(
        default=5.0, gt=0, le=60, description="a grammar that takes longer to compile: 400"
    )

    metrics_compat: Literal["none", "vllm"] = Field(
        default="none", description="vllm: /metrics also has vLLM's names"
    )
    metrics_adapters: int = Field(
        default=50, ge=0, le=500, description="adapters counted by name; the rest as (other)"
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="OTLP over HTTP for traces and gen_ai metrics, such as "
        "http://localhost:4318; none: no export",
    )

    drain_timeout_s: float = Field(
        default=30.0, ge=0, le=3600, description="time for open requests at the end"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="what is logged: this and worse"
    )
    log_format: Literal["console", "json"] = Field(default="console", description="form of logs")

    @field_validator("adapters", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part for part in value.split(os.pathsep) if part)
        return value

    @field_validator("pinned_adapters", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("vllm_args", mode="before")
    @classmethod
    def _split_arguments(cls, value: Any) -> Any:
        return split_arguments(value)

    @field_validator("vllm_args")
    @classmethod
    def _are_named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_arguments(value)
        return value

    @field_validator("blob_options")
    @classmethod
    def _is_object(cls, value: SecretStr) -> SecretStr:
        try:
            if isinstance(json.loads(value.get_secret_value()), dict):
                return value
        except ValueError:
            pass
        raise ValueError("expected a JSON object")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 2 * self.max_adapter_bytes > self.adapter_memory_bytes:
            raise ValueError(
                f"max_adapter_bytes: got {self.max_adapter_bytes}, expected at most half of "
                f"adapter_memory_bytes ({self.adapter_memory_bytes}), as a file of 16-bit numbers "
                "takes twice its size in memory"
            )
        if self.allow_inline_adapters:
            self._check_inline()
        self._check_engine()
        return self

    @property
    def shows_metrics(self) -> bool:
        """Whether ``/metrics`` needs no key."""
        if self.metrics_public is not None:
            return self.metrics_public
        return is_loopback(self.host) and not self.require_keys

    def _check_inline(self) -> None:
        """Refuse a size of inline adapters that other limits do not let through."""
        # Base64 makes four characters of three bytes, and the request says more than that.
        most = min(self.max_body_bytes * 3 // 4 - 4096, self.max_adapter_bytes)
        if self.max_inline_adapter_bytes > most:
            raise ValueError(
                f"max_inline_adapter_bytes: got {self.max_inline_adapter_bytes}, expected at most "
                f"{most}, as max_body_bytes ({self.max_body_bytes}, in base64) and "
                f"max_adapter_bytes ({self.max_adapter_bytes}) allow"
            )

    def _check_engine(self) -> None:
        """Refuse settings that the chosen engine has no use for."""
        of_other = _OF_VLLM if self.engine == "embedded" else _OF_EMBEDDED
        for name in of_other:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                shown = shown_arguments(value) if name == "vllm_args" else value
                raise ValueError(
                    f"{name}: got {shown!r}, expected nothing with engine {self.engine!r}, which "
                    "has no use for it"
                )

    def resolve_device(self) -> tuple[str, Literal["float32", "bfloat16", "float16"]]:
        """Device and dtype with ``auto`` decided. Asks torch what there is."""
        import torch

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.dtype == "auto":
            return device, "float32" if device == "cpu" else "bfloat16"
        return device, self.dtype

    @property
    def database(self) -> str:
        """URL of the database, password included."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        from server.database import sqlite_url

        return sqlite_url(self.catalog_file)

    @property
    def catalog_file(self) -> Path:
        """The embedded database."""
        return self.data_dir / "catalog.sqlite"

    @property
    def max_open(self) -> int:
        """Most choices and labels that the engine takes in at once, of all requests together."""
        return self.engine_config().max_open

    def vllm_options(self) -> VllmOptions:
        """The part of the settings that the vLLM engine needs beside :meth:`engine_config`."""
        from reft_core.vllm.arguments import VllmOptions

        return VllmOptions(
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            data_parallel_size=self.data_parallel_size,
            distributed_executor_backend=self.distributed_executor_backend,
            gpu_memory_utilization=self.gpu_memory_utilization,
            resident_bytes=self.adapter_memory_bytes,
            extra=dict(parse_argument(text) for text in self.vllm_args),
        )

    def grammar_limits(self) -> GrammarLimits:
        """The bounds of a grammar that a request brings."""
        from reft_core.grammar import GrammarLimits

        return GrammarLimits(max_bytes=self.max_grammar_bytes)

    def engine_config(self) -> EngineConfig:
        """The part of the settings that the engine needs."""
        from reft_core.engine.config import EngineConfig

        return EngineConfig(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            max_prefill_tokens=self.max_prefill_tokens,
            kv_tokens=self.kv_tokens,
            prefix_cache_bytes=self.prefix_cache_bytes,
            forward=self.forward,
            cuda_graphs=self.cuda_graphs,
            num_threads=self.num_threads,
        )


def environment() -> tuple[dict[str, Any], list[str]]:
    """The settings that ``REFT_*`` variables give, and the names of variables that are none."""
    prefix = "REFT_"
    known = {f"{prefix}{name}".upper() for name in Settings.model_fields} | CLIENT_VARIABLES
    strange = [name for name in os.environ if name.upper().startswith(prefix)]
    return EnvSettingsSource(Settings)(), sorted(n for n in strange if n.upper() not in known)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
