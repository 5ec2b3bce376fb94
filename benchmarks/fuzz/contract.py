"""The server against its own OpenAPI document, by Schemathesis."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, Config, GenerationMode, HookContext, hooks
from schemathesis.config import ProjectConfig, ProjectsConfig
from schemathesis.engine import events, from_schema

from benchmarks.fuzz.base import good_files
from benchmarks.fuzz.sensible import reachable, sensible
from benchmarks.fuzz.serving import ADMIN_KEY, API_KEY, Target


@dataclass
class Report:
    """What a run found."""

    cases: int = 0
    server_errors: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by route and status."""
    problems: list[str] = field(default_factory=list)


def attack(
    target: Target, *, seed: int, max_examples: int, max_time_s: int | None = None
) -> Report:
    """Send what the document allows and what it does not, call by call and in sequences."""
    document = target.app.openapi()
    config = _config(target.url, seed, max_examples, max_time_s)
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(document)), config=config)
    schemathesis.openapi.media_type(
        "application/octet-stream", st.sampled_from([good.data for good in good_files()])
    )

    def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
        _aim(case, target)

    schemathesis.hook(before_call)
    report = Report()
    seen: set[str] = set()
    try:
        for event in from_schema(schema).execute():
            _note(event, report, seen)
    finally:
        hooks.unregister(before_call)
    return report


def _config(url: str, seed: int, max_examples: int, max_time_s: int | None) -> Config:
    settings = {
        "base-url": url,
        "workers": 1,
        "continue-on-failure": True,
        "request-timeout": 30,
        "auth": {"openapi": {"ApiKey": {"bearer": API_KEY}, "AdminKey": {"bearer": ADMIN_KEY}}},
        "generation": {"max-examples": max_examples, "no-shrink": True, "database": "none"},
        "checks": {
            # Fields depend on one another, which the document cannot say.
            "positive_data_acceptance": {"enabled": False},
            "negative_data_rejection": {"expected-statuses": ["4xx"]},
        },
        "phases": {"stateful": {"max-steps": 6}},
    }
    return Config(
        seed=seed,
        max_time=max_time_s,
        projects=ProjectsConfig(default=ProjectConfig.from_dict(settings)),
    )


def _aim(case: Case[Any], target: Target) -> None:
    """Make most bodies that the document allows such that the server can do what they ask, and
    most that it forbids such that nothing else is wrong with them."""
    meta, body = case.meta, case.body
    if (
        meta is None
        or not isinstance(body, dict)
        or "model" not in body
        or len(repr(body)) % 5 == 0
    ):
        return
    if meta.generation.mode is GenerationMode.POSITIVE:
        case.body = sensible(body, target.models, target.vocab_size)
    else:
        case.body = reachable(body, target.models)


def _note(event: events.EngineEvent, report: Report, seen: set[str]) -> None:
    """Add what an event says to the report; equal failures of one route count once."""
    if isinstance(event, events.NonFatalError):
        report.problems.append(f"{event.label}: {event.value!r}")
    elif isinstance(event, events.FatalError):
        report.problems.append(f"schemathesis: {event.exception!r}")
    if not isinstance(event, events.ScenarioFinished):
        return
    recorder = event.recorder
    report.cases += len(recorder.interactions)
    for case_id, interaction in recorder.interactions.items():
        response = interaction.response
        if response is None:
            report.problems.append(f"{recorder.label}: no answer to {interaction.request.uri}")
            report.server_errors += 1
            continue
        case = recorder.cases.get(case_id)
        label = case.value.operation.label if case else recorder.label
        report.statuses[f"{label} {response.status_code}"] += 1
        report.server_errors += response.status_code >= 500
    for checks in recorder.checks.values():
        for check in checks:
            if check.failure_info is None:
                continue
            failure = check.failure_info.failure
            key = f"{failure.operation} {check.name} {failure.title}"
            if key not in seen:
                seen.add(key)
                report.problems.append(
                    f"{key}: {failure.message}\n{check.failure_info.code_sample[:2000]}"
                )
