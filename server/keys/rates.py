"""How much each key may ask for: requests and tokens a minute, and requests at once.

Counted in this process alone: of several replicas, each allows a key its whole rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from reft_core.errors import InvalidRequest, RateLimited, explain
from server.keys.buckets import Bucket, Clock
from server.keys.principal import ANYONE, Limits, Principal
from server.keys.usage import TenantUsage, Usage

_BUSY_RETRY_S = 1.0


class Account:
    """What one key has left. Belongs to the event loop."""

    def __init__(self, limits: Limits, usage: TenantUsage, clock: Clock) -> None:
        self.usage = usage
        self.max_open = limits.max_concurrency
        self.num_open = 0
        self.requests = _bucket(limits.requests_per_minute, clock)
        self.tokens = _bucket(limits.tokens_per_minute, clock)


def _bucket(per_minute: int, clock: Clock) -> Bucket | None:
    return Bucket(per_minute, clock) if per_minute else None


class Caller:
    """Who makes one request, and what its tokens are charged to, until its response is sent.

    Tokens never end a request that was accepted: an answer that is longer than what is left
    overdraws the key, and its next request waits for what is owed.
    """

    def __init__(self, principal: Principal, account: Account) -> None:
        self.principal = principal
        self._account = account

    @property
    def tenant(self) -> str:
        """The principal's."""
        return self.principal.tenant

    def reserve(self, num_tokens: int) -> None:
        """Take a prompt's tokens, or raise as :meth:`check_tokens` does and take nothing.

        To be followed by :meth:`charge` without them once the prompt is accepted, or
        :meth:`give_back`.
        """
        self.check_tokens(num_tokens)
        self._take(num_tokens)

    def give_back(self, num_tokens: int) -> None:
        """Tokens that were reserved are not used after all."""
        self._take(-num_tokens)

    def check_tokens(self, num_tokens: int) -> None:
        """Raise :class:`RateLimited` if the key has fewer tokens left.

        Raises :class:`InvalidRequest` if it never has so many.
        """
        bucket = self._account.tokens
        if bucket is None:
            return
        if num_tokens > bucket.capacity:
            allowed = f"at most {bucket.capacity}, which this key may use in a minute"
            raise InvalidRequest.because("prompt", f"{num_tokens} tokens", allowed)
        if (wait_s := bucket.wait_s(num_tokens)) > 0:
            allowed = f"at most {_left(bucket)} now, of this key's {bucket.capacity} a minute"
            self._refuse("tokens", num_tokens, allowed, wait_s)

    def charge(self, num_prompt: int, num_generated: int, *, reserved: bool = False) -> None:
        """Count tokens of an accepted request, be there enough left or not.

        ``reserved`` says that those of the prompt were taken before.
        """
        self._take(num_generated + (0 if reserved else num_prompt))
        self._account.usage.prompt_tokens.inc(num_prompt)
        self._account.usage.generation_tokens.inc(num_generated)

    def headers(self) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*`` headers, of those limits that there are."""
        found = {}
        for name in ("requests", "tokens"):
            bucket: Bucket | None = getattr(self._account, name)
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                found[f"x-ratelimit-remaining-{name}"] = str(_left(bucket))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(bucket.capacity):.3f}s"
        return found

    @contextmanager
    def open(self) -> Iterator[None]:
        """One request of the key, while it lasts. Raises :class:`RateLimited`."""
        account = self._account
        if account.max_open and account.num_open >= account.max_open:
            allowed = f"at most {account.max_open} requests of this key at once"
            self._refuse("concurrency", account.num_open + 1, allowed, _BUSY_RETRY_S)
        if account.requests is not None:
            if (wait_s := account.requests.wait_s(1)) > 0:
                allowed = f"at most {account.requests.capacity} of this key in a minute"
                self._refuse("requests", "one more", allowed, wait_s)
            account.requests.take(1)
        account.usage.requests.inc()
        account.num_open += 1
        try:
            yield
        finally:
            account.num_open -= 1

    def _take(self, num_tokens: int) -> None:
        if self._account.tokens is not None:
            self._account.tokens.take(num_tokens)

    def _refuse(self, limit: str, got: object, allowed: str, wait_s: float) -> NoReturn:
        self._account.usage.count_refused(limit)
        raise RateLimited(explain(limit, got, allowed), retry_after_s=wait_s)


def _left(bucket: Bucket) -> int:
    """Whole units that could be taken now."""
    return max(0, math.floor(bucket.level))


class Rates:
    """The accounts of all keys that were used. Belongs to the event loop."""

    def __init__(self, usage: Usage, clock: Clock = time.monotonic) -> None:
        self._usage = usage
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def caller(self, principal: Principal) -> Caller:
        """A request of ``principal``. Limits are those of the first request with its id."""
        account = self._accounts.get(principal.id)
        if account is None:
            usage = TenantUsage(self._usage, principal.tenant)
            account = Account(principal.limits, usage, self._clock)
            self._accounts[principal.id] = account
        return Caller(principal, account)


FREE = Rates(Usage()).caller(ANYONE)
"""What starts work that no request asked for: no limits, counted nowhere."""
