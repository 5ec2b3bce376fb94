"""Which adapters requests ask for, in a bounded number of time series."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.answering.named import UsedAdapter

BASE = "(base)"
OTHER = "(other)"
"""No adapter can have these names, as brackets are not allowed in them."""
_CANDIDATES_PER_NAME = 4
"""How many names without a series are watched, for each that has one."""
_WINDOW_PER_NAME = 256
"""Requests, for each name that has a series, after which all that came before counts half."""

Key = tuple[str, str]
"""An adapter's tenant and name."""


def keys_of(versions: Iterable[UsedAdapter]) -> tuple[Key, ...]:
    """The adapters that some versions are of."""
    return tuple((version.tenant, version.name) for version in versions)


class AdapterUsage(Collector):
    """Requests by adapter: the names most asked for, and the rest together.

    A counter must not fall, so what was once counted with the rest stays there. The first names
    get a series each; another one takes the place of the one asked for least when it has lately
    been asked for more than twice as often, so that equals never change places. Belongs to the
    event loop.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._series: dict[Key, int] = {}
        """The value of each series."""
        self._weights: Counter[Key] = Counter()
        """How often the name of each series was lately asked for."""
        self._candidates: OrderedDict[Key, int] = OrderedDict()  # least recently asked for first
        self._num_until_halved = _WINDOW_PER_NAME * most
        self._num_base = 0
        self._num_other = 0
        self._in_use: Counter[Key] = Counter()
        self.num_slots = 0
        """Most adapters that can be in one batch."""

    def label(self, keys: Sequence[Key]) -> str:
        """The name of the first of a request's adapters if it has a series of its own, else
        :data:`OTHER`; :data:`BASE` if there is none."""
        if not keys:
            return BASE
        return keys[0][1] if keys[0] in self._series else OTHER

    def begin(self, keys: Iterable[Key]) -> None:
        """A request for these adapters was accepted; none is the base model."""
        keys = list(keys)
        for key in keys:
            self._in_use[key] += 1
            self._count(key)
        if not keys:
            self._num_base += 1

    def end(self, keys: Iterable[Key]) -> None:
        """A request that :meth:`begin` was told of has ended."""
        for key in keys:
            self._in_use[key] -= 1
            if not self._in_use[key]:
                del self._in_use[key]

    def forget(self, name: str, tenant: str = "") -> None:
        """An adapter was deleted: its series ends."""
        self._drop((tenant, name))
        self._candidates.pop((tenant, name), None)

    def collect(self) -> Iterator[Metric]:
        """One snapshot."""
        requests = CounterMetricFamily(
            "reft_adapter_requests",
            "Requests accepted, by adapter: those most asked for, (other) and (base)",
            labels=["adapter", "tenant"],
        )
        for (tenant, name), value in sorted(self._series.items()):
            requests.add_metric([name, tenant], value)
        requests.add_metric([OTHER, ""], self._num_other)
        requests.add_metric([BASE, ""], self._num_base)
        yield requests
        in_use = GaugeMetricFamily(
            "reft_adapters_in_use", "Adapters that open requests use", value=len(self._in_use)
        )
        yield in_use
        yield self._lora_info()

    def _lora_info(self) -> Metric:
        """vLLM's way to say which adapters run: names in a label, the time as the value."""
        names = sorted(name for _, name in list(self._in_use))[: self._most]
        family = GaugeMetricFamily(
            "reft_lora_requests_info",
            "Adapters of open requests; the value is the time of the scrape",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        family.add_metric([str(self.num_slots), ",".join(names), ""], time.time())
        return family

    def _count(self, key: Key) -> None:
        """Count one request for an adapter."""
        self._age()
        if key not in self._series and len(self._series) < self._most:
            self._series[key] = 0
        if key in self._series:
            self._series[key] += 1
            self._weights[key] += 1
            return
        self._num_other += 1
        if not self._most:
            return
        weight = self._candidates.pop(key, 0) + 1
        least = min(self._series, key=self._weights.__getitem__)
        if weight > 2 * self._weights[least]:
            self._drop(least)
            self._series[key], self._weights[key] = 0, weight
            return
        self._candidates[key] = weight
        if len(self._candidates) > _CANDIDATES_PER_NAME * self._most:
            self._candidates.popitem(last=False)

    def _age(self) -> None:
        """From time to time, have what came before count half."""
        self._num_until_halved -= 1
        if self._num_until_halved > 0:
            return
        self._num_until_halved = _WINDOW_PER_NAME * self._most
        for key in self._weights:
            self._weights[key] //= 2
        for key in self._candidates:
            self._candidates[key] //= 2

    def _drop(self, key: Key) -> None:
        """End a name's series, if it has one."""
        self._series.pop(key, None)
        self._weights.pop(key, None)
