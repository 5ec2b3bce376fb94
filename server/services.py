"""What the routes share: one object, built at start, reached from a request."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

from fastapi import Request

from reft_core import __version__
from reft_core.engine.interface import AdapterHost
from reft_core.errors import UnsupportedFeature
from reft_core.loading import LoadedModel
from server.adapters.pins import Pins
from server.adapters.residency import Residency
from server.adapters.upkeep import Upkeep
from server.answering.generator import Generator
from server.answering.grammars import Grammars
from server.answering.labelling import Labeller
from server.http.lifecycle import Lifecycle
from server.http.readiness import Readiness
from server.keys import Door, KeyStore, Rates
from server.observability.metrics import Metrics
from server.registry import Registry
from server.settings import Settings


@dataclass(frozen=True)
class Services:
    """The parts of one running server."""

    settings: Settings
    loaded: LoadedModel
    engine: AdapterHost
    registry: Registry
    residency: Residency
    pins: Pins
    upkeep: Upkeep
    text_generator: Generator | None
    """None on an encoder, which generates nothing."""
    labeller: Labeller
    grammars: Grammars
    metrics: Metrics
    lifecycle: Lifecycle
    readiness: Readiness
    key_store: KeyStore
    door: Door
    rates: Rates
    started_at: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def fingerprint(self) -> str:
        """Names what answers depend on beside the request: release, base model, engine, device,
        dtype.

        With a seed, the same value promises the same answer.
        """
        device, dtype = self.settings.resolve_device()
        facts = (__version__, self.engine.model.fingerprint, self.settings.engine, device, dtype)
        return f"fp_{hashlib.sha256('/'.join(facts).encode()).hexdigest()[:12]}"

    @property
    def generator(self) -> Generator:
        """What generates text. Raises :class:`UnsupportedFeature` on an encoder."""
        if self.text_generator is None:
            raise UnsupportedFeature(
                f"path: {self.engine.model.name} is an encoder, which generates no text; "
                "expected /v1/classify",
                field="path",
            )
        return self.text_generator


def services_of(request: Request) -> Services:
    """The services of the server that got ``request``."""
    return cast(Services, request.app.state.services)
