"""What each tenant used: metrics that only an operator is shown, so in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

LIMITS = ("requests", "tokens", "concurrency")
"""What a key has limits of."""


class TenantUsage:
    """The counters of one tenant."""

    def __init__(self, usage: Usage, tenant: str) -> None:
        self.requests = usage.requests.labels(tenant)
        self.prompt_tokens = usage.prompt_tokens.labels(tenant)
        self.generation_tokens = usage.generation_tokens.labels(tenant)
        self._refused = {limit: usage.refused.labels(tenant, limit) for limit in LIMITS}

    def count_refused(self, limit: str) -> None:
        """A request was over its key's ``limit``."""
        self._refused[limit].inc()


class Usage:
    """Counters by tenant. Tenants exist because an admin made keys for them, so they are few."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests let in", "tenant")
        self.refused = self._counter(
            "requests_refused",
            f"Requests over a limit of their key: {', '.join(LIMITS)}",
            "tenant",
            "limit",
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens accepted", "tenant")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated", "tenant")

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"reft_tenant_{name}", what, labels, registry=self.registry)
