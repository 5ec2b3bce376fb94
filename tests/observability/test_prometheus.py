"""The dashboard and the alerts, against a real Prometheus that scrapes a real server.

The server runs a tiny model under some traffic of every kind.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from server.app import create_app
from server.http.run import DrainingServer
from server.settings import Settings
from tests.factories import random_adapter_bytes
from tests.observability.prometheus import (
    ALERTS,
    CONFIG,
    DASHBOARD,
    Prometheus,
    needs_prometheus,
    scraping,
)
from tests.server.fakes import make_tiny_loaded, wait_until

ADMIN_KEY = "admin-key-for-tests"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
NAME = re.compile(r"\b(?:reft|process)_[a-z0-9_]+|\bup\b")
SCRAPES = 8
"""Under traffic, so that every rate over the last ten seconds is one."""

pytestmark = needs_prometheus


def expressions() -> list[tuple[str, str]]:
    """Panel and query of everything the dashboard asks, its variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    filled = {"$__rate_interval": "10s", "$model": ".*", "$instance": ".*"}
    found = []
    for panel in panels:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for variable, value in filled.items():
                expression = expression.replace(variable, value)
            assert "$" not in expression, expression
            found.append((panel["title"], expression))
    return found


def alerts() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


class Traffic:
    """Requests of every kind, until it is told to stop."""

    def __init__(self, url: str) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(url, i)) for i in range(4)]
        self.failures: list[BaseException] = []

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert self.failures == []

    def _run(self, url: str, worker: int) -> None:
        try:
            with httpx.Client(base_url=url, timeout=30) as http:
                turn = worker
                while not self._stop.is_set():
                    self._one(http, turn)
                    turn += 1
                    self._stop.wait(0.02)
        except BaseException as error:
            self.failures.append(error)

    def _one(self, http: httpx.Client, turn: int) -> None:
        model = "tiny" if turn % 5 == 0 else f"a{turn % 6}"
        ask = {"model": model, "prompt": "a long shared beginning of every prompt " + "x" * 20}
        ask |= {"max_tokens": 8, "stream": turn % 2 == 0}
        if turn % 11 == 0:
            assert http.get("/admin/adapters", headers=ADMIN).status_code == 200
            ask["model"] = "nobody"
        http.post("/v1/completions", json=ask)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """A server with six adapters, and room for three."""
    loaded = make_tiny_loaded()
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=256, max_num_seqs=4))
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), admin_key=ADMIN_KEY, port=0, metrics_adapters=4
    )
    app = create_app(settings, engine, loaded)
    urls: list[str] = []
    server = DrainingServer(app, settings, urls.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: bool(urls), "the server to listen", timeout_s=30)
    files = [
        random_adapter_bytes(loaded.description, seed=i, positions="l2", size=0.05)
        for i in range(6)
    ]
    for i, data in enumerate(files):
        sent = httpx.post(f"{urls[0]}/admin/adapters/a{i}", content=data, headers=ADMIN)
        assert sent.status_code == 201, sent.text
    residency = app.state.services.residency
    residency._budget_bytes, residency._wait_s = 4 * len(files[0]), 5.0
    yield urls[0]
    server.handle_exit(15, None)
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def prometheus(url: str, tmp_path_factory) -> Iterator[Prometheus]:
    """One that has scraped the server under traffic, which goes on."""
    target = url.removeprefix("http://")
    with Traffic(url), scraping(target, tmp_path_factory.mktemp("prometheus")) as prometheus:
        enough = f"count_over_time(reft_ready[1m]) >= {SCRAPES}"
        wait_until(lambda: bool(prometheus.query(enough)), "enough scrapes", timeout_s=60)
        yield prometheus


def test_promtool_accepts_our_files() -> None:
    for kind, path in (("config", CONFIG), ("rules", ALERTS)):
        done = subprocess.run(["promtool", "check", kind, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    tests = Path(__file__).parent / "alerts_test.yml"
    done = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = [test["name"] for test in yaml.safe_load(tests.read_text())["tests"]]
    for alert in alerts():
        assert alert["alert"] in tested
        assert f"{alert['alert']}, and what is no reason for it" in tested


def test_every_query_of_the_dashboard_returns_data(prometheus: Prometheus) -> None:
    empty = []
    for panel, expression in expressions():
        values = [float(series["value"][1]) for series in prometheus.query(expression)]
        if not values or all(map(math.isnan, values)):
            empty.append(f"{panel}: {expression}")
    assert empty == []


def test_every_metric_that_is_used_exists(prometheus: Prometheus) -> None:
    used = {name for _, expression in expressions() for name in NAME.findall(expression)}
    used |= {name for alert in alerts() for name in NAME.findall(alert["expr"])}
    assert len(used) > 40
    missing = [name for name in sorted(used) if not prometheus.query(name)]
    assert missing == []


def test_the_dashboards_variables_have_values(prometheus: Prometheus, url: str) -> None:
    assert prometheus.label_values("model_name", "reft_ready") == ["tiny"]
    assert prometheus.label_values("instance", "reft_ready") == [url.removeprefix("http://")]


def test_a_healthy_server_raises_no_alert(prometheus: Prometheus) -> None:
    rules = prometheus.rules()
    assert len(rules) == len(alerts())
    for rule in rules:
        assert rule["health"] == "ok", rule
        firing = [alert for alert in rule["alerts"] if alert["state"] == "firing"]
        assert firing == [], rule["name"]


def test_counts_add_up(prometheus: Prometheus) -> None:
    """Per adapter there are as many series as are allowed, and some of everything happened."""
    names = {s["metric"]["adapter"] for s in prometheus.query("reft_adapter_requests_total")}
    assert {"(base)", "(other)"} < names
    assert len(names) == 4 + 2
    for name in ("reft_adapter_evictions_total", "reft_prefix_tokens_shared_across_adapters_total"):
        (series,) = prometheus.query(name)
        assert float(series["value"][1]) > 0, name


def test_panels_say_what_they_show() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) > 30
    assert all(panel["description"].endswith(".") for panel in panels)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
