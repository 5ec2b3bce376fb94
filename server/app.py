"""Builds the application: services at start, routes, and an orderly end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import structlog
from fastapi import FastAPI

from reft_core import __version__
from reft_core.adapter import read_adapter
from reft_core.classification import EncoderEngine, classifier_on
from reft_core.engine.interface import AdapterHost, Engine
from reft_core.errors import AdapterError, InvalidRequest
from reft_core.grammar import GrammarCompiler
from reft_core.hub import fetch_adapter
from reft_core.loading import LoadedModel
from reft_core.names import HUB_PATTERN
from server.adapters.pins import Pins
from server.adapters.residency import Residency
from server.adapters.upkeep import Upkeep
from server.answering.generator import Generator
from server.answering.grammars import Grammars
from server.answering.inline import InlineReader
from server.answering.labelling import Labeller
from server.engines import build_engine, load_base_model
from server.http.errors import install_handlers
from server.http.lifecycle import Lifecycle
from server.http.middleware import RequestContext
from server.http.openapi import document
from server.http.readiness import Readiness
from server.keys import Door, KeyStore, Rates
from server.keys.door import check_exposure
from server.observability.metrics import Metrics
from server.observability.tracing.telemetry import telemetry_for
from server.registry import Registry, open_registry
from server.routes import (
    admin,
    audit,
    chat,
    classify,
    completions,
    docs,
    keys,
    loading,
    models,
    ops,
    versions,
)
from server.services import Services
from server.settings import Settings

log = structlog.get_logger(__name__)


def create_app(
    settings: Settings, engine: AdapterHost | None = None, loaded: LoadedModel | None = None
) -> FastAPI:
    """The application. What is not given (model, engine) is built when it starts.

    An ``engine`` that is given must not have been started, and needs its ``loaded`` model.
    """
    assert loaded is not None or engine is None, "an engine comes with its model"
    metrics = Metrics(settings.metrics_compat, settings.metrics_adapters)
    telemetry = telemetry_for(settings.otlp_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = await asyncio.to_thread(_build_services, settings, engine, loaded, metrics)
        app.state.services = services
        services.lifecycle.start()
        try:
            await services.pins.load()
            services.upkeep.start()
            log.info("ready", model=services.engine.model.name)
            yield
        finally:
            await services.upkeep.stop()
            await services.lifecycle.drain()
            services.registry.close()
            services.grammars.close()
            await asyncio.to_thread(telemetry.close)

    app = FastAPI(
        docs_url=None,  # our own routes, which need a key where the API does
        redoc_url=None,
        openapi_url=None,
        title="reft-serve",
        version=__version__,
        description="OpenAI-compatible text generation; adapters are chosen by `model`.",
        lifespan=lifespan,
    )
    app.add_middleware(RequestContext, metrics=metrics, telemetry=telemetry)
    install_handlers(app)
    for module in (completions, chat, classify, models, ops, docs, admin, versions):
        app.include_router(module.router)
    for module in (audit, keys, loading):
        app.include_router(module.router)
    document(app, settings)
    return app


def _build_services(
    settings: Settings, engine: AdapterHost | None, loaded: LoadedModel | None, metrics: Metrics
) -> Services:
    """Every part of the server, connected. Blocks while the model loads."""
    loaded = loaded or load_base_model(settings)
    registry = open_registry(settings, loaded.description)
    key_store = KeyStore(registry.engine)
    try:
        check_exposure(settings, key_store)
        register_files(registry, adapter_files(settings.adapters, settings.max_adapter_bytes))
        engine = engine or build_engine(settings, loaded)  # last, as its processes take a minute
    except BaseException:
        registry.close()
        if engine is not None:
            engine.stop()
        raise
    compiler = GrammarCompiler(loaded, settings.grammar_limits())
    grammars = Grammars(compiler, most=settings.max_grammars, timeout_s=settings.grammar_timeout_s)
    residency = Residency(
        engine,
        registry.read,
        settings.adapter_memory_bytes,
        metrics.observe_load,
        settings.adapter_wait_s,
    )
    metrics.watch(engine, residency)
    lifecycle = Lifecycle(engine, settings.drain_timeout_s)
    readiness = Readiness(lifecycle, registry, metrics)
    tokenizer, timeout_s = loaded.tokenizer, settings.request_timeout_s
    inline = InlineReader(
        engine.model, settings.max_inline_adapter_bytes if settings.allow_inline_adapters else None
    )
    generator = None
    if not isinstance(engine, EncoderEngine):
        causal: Engine = engine  # type: ignore[assignment]  # all others generate
        generator = Generator(
            causal,
            registry,
            residency,
            tokenizer,
            metrics,
            grammars,
            inline,
            timeout_s,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_answer_tokens=settings.max_answer_tokens,
            max_prompt_logprobs=settings.max_prompt_logprobs,
        )
    classifier = classifier_on(engine, tokenizer)
    pins = Pins(settings.pinned_adapters, registry, residency)
    poll_s, grace_s = settings.registry_poll_s, settings.delete_grace_s
    return Services(
        settings=settings,
        loaded=loaded,
        engine=engine,
        registry=registry,
        residency=residency,
        pins=pins,
        upkeep=Upkeep(registry, residency, pins, poll_s, grace_s),
        text_generator=generator,
        labeller=Labeller(
            classifier,
            registry,
            residency,
            tokenizer,
            metrics,
            inline,
            timeout_s,
            max_text_tokens=settings.max_prompt_tokens,
        ),
        grammars=grammars,
        metrics=metrics,
        lifecycle=lifecycle,
        readiness=readiness,
        key_store=key_store,
        door=Door(settings, key_store),
        rates=Rates(metrics.tenants),
    )


def adapter_files(paths: Iterable[Path], max_bytes: int) -> dict[Path, str]:
    """The adapter files at ``paths``, each with the name in its spec.

    A folder means every ``.safetensors`` file directly in it, and what is no path but has the form
    of a hub's id the adapter there. All of each is checked, but for what depends on the base
    model. Raises :class:`InvalidRequest` for a path without any, and
    what reading an adapter raises, with the file's name.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if not path.exists() and re.fullmatch(HUB_PATTERN, str(path)):
            path = fetch_adapter(str(path), max_bytes)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise InvalidRequest.because(
                "adapters", str(path), "an adapter file, a folder with some, or a hub's id"
            )
        for file in files:
            with _about(file):
                found[file] = read_adapter(file, max_bytes=max_bytes).spec.name
    return found


def register_files(registry: Registry, files: Mapping[Path, str]) -> None:
    """Upload the operator's own adapter files, each under its name.

    Raises what an upload raises, with the file's name.
    """
    for file, name in files.items():
        with _about(file):
            uploaded = registry.upload(name, file.read_bytes())
        log.info("adapter registered", name=name, version=uploaded.version.number)


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """Errors about an adapter say in which file it is."""
    try:
        yield
    except AdapterError as error:
        raise error.within(str(file)) from None
