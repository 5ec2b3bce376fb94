"""What adapters cost inside vLLM: who is compared with whom, on workers that pretend."""

from __future__ import annotations

import importlib.metadata
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vllm_tax
from benchmarks.peers import contenders, environments
from benchmarks.peers.contenders import Variant
from benchmarks.peers.plugin import expose_plugin, plugin_names
from benchmarks.peers.protocol import OWN_PYTHON, PeerMissing
from benchmarks.soak.world import save_tiny_model
from benchmarks.vllm_tax import Regime
from reft_core.convert.base import base_from_folder
from reft_core.loading import Dtype
from reft_core.sites import ModelDescription
from reft_core.threads import run_in_own_thread

REGIME = Regime(requests=4, input_tokens=3, output_tokens=2, repeats=4, lora_repeats=2)


class FakeWorker:
    """Takes a second, and as much more as its engine and its adapters cost; far longer at first."""

    def __init__(self, label: str, changed_by: int = 1) -> None:
        self.label = label
        self.runs: list[int] = []
        self._changed_by = changed_by

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        if op == "share":
            return self._share(arguments["adapters"])
        adapters = arguments["adapters"]
        cost = {"base": 0, "plugin": 0.25, "lora": 3}[self.label] + (0.75 if adapters else 0)
        first = adapters not in self.runs
        self.runs.append(adapters)
        tokens = [[self._changed_by if adapters else 0] * 2 for _ in arguments["prompts"]]
        return {"seconds": 100.0 if first else 1 + cost, "tokens": tokens}

    def _share(self, adapters: int) -> dict[str, Any]:
        answers = [[number] for number in range(adapters)]
        return {"shared": answers, "apart": answers, "base": [-1], "hits": 930, "queries": 1000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    run_in_own_thread(lambda: save_tiny_model(path, seed=0))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelDescription:
    return base_from_folder(str(folder))


def _workers(
    monkeypatch: pytest.MonkeyPatch, absent: str = "", changed_by: int = 1
) -> dict[str, FakeWorker]:
    """Those that are started from now on, by label."""
    started: dict[str, FakeWorker] = {}

    def start(variant: Variant, *_: object) -> FakeWorker:
        if variant.label == absent:
            raise PeerMissing("cannot be installed")
        return started.setdefault(variant.label, FakeWorker(variant.label, changed_by))

    monkeypatch.setattr(vllm_tax, "start", start)
    monkeypatch.setattr(vllm_tax, "wait_loaded", lambda worker: {"versions": {}})
    return started


def test_ratios_are_to_the_engine_without_a_plugin(
    folder: Path, model: ModelDescription, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = _workers(monkeypatch)
    tax = vllm_tax.measure_tax(REGIME, folder, model, tmp_path)
    assert tax["base"]["throughput_ratio"] == tax["control"]["throughput_ratio"] == [1, 1, 1]
    assert tax["plugin_idle"]["throughput_ratio"] == [0.8, 0.8, 0.8]
    assert tax["tax_64"]["throughput_ratio"] == [0.5, 0.5, 0.5]
    assert tax["base"]["tokens_per_s"] == 8
    assert [tax[name]["answers_changed"] for name in ("plugin_idle", "tax_1")] == [0, 4]
    # Half the repeats have LoRA in them, and all that are counted had a run before.
    assert len(workers["lora"].runs) == 3 * (1 + 2)
    assert len(workers["plugin"].runs) == 4 * (1 + 4)
    sharing = {"hit_rate": 0.93}
    assert vllm_tax.summary(REGIME, tax, sharing) == {
        "plugin_idle": 0.8,
        "tax_1": 0.5,
        "tax_16": 0.5,
        "tax_64": 0.5,
        "multilora_64": 0.211,
        "shared_prefix_hit_rate": 0.93,
    }


def test_an_engine_may_be_missing(
    folder: Path, model: ModelDescription, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _workers(monkeypatch, absent="lora")
    tax = vllm_tax.measure_tax(REGIME, folder, model, tmp_path)
    assert tax["missing"] == {"lora": "cannot be installed"}
    figures = vllm_tax.summary(REGIME, tax, {"missing": "no vLLM"})
    assert figures["tax_64"] == 0.5
    assert figures["multilora_64"] is figures["shared_prefix_hit_rate"] is None


def test_adapters_that_do_nothing_are_no_result(
    folder: Path, model: ModelDescription, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _workers(monkeypatch, changed_by=0)
    with pytest.raises(SystemExit, match="tax_1: no adapter changed an answer"):
        vllm_tax.measure_tax(REGIME, folder, model, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_float32_an_idle_plugin_changes_nothing(
    dtype: Dtype,
    folder: Path,
    model: ModelDescription,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_tax, "_num_different", lambda some, others: 1)
    _workers(monkeypatch)
    with ExitStack() as stack:
        if dtype == "float32":
            complaint = pytest.raises(SystemExit, match="control changed 1 answers of the base")
            stack.enter_context(complaint)
        vllm_tax.measure_tax(replace(REGIME, dtype=dtype), folder, model, tmp_path)


def test_sharing_is_what_vllm_counted(
    folder: Path, model: ModelDescription, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _workers(monkeypatch)
    sharing = vllm_tax.measure_sharing(REGIME, folder, model, tmp_path)
    assert sharing["hit_rate"] == 0.93
    assert sharing["answers_of_their_own"] == 16


def test_the_plugin_is_found_where_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expose_plugin(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    [plugin] = importlib.metadata.distribution("reft-serve-plugin").entry_points
    assert (plugin.group, plugin.name) == ("vllm.general_plugins", *plugin_names())
    assert callable(plugin.load())


@pytest.mark.parametrize("has_plugin", [True, False])
def test_only_who_is_shown_the_plugin_loads_it(
    has_plugin: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, str] = {}

    class Recorder:
        def __init__(self, *arguments: Any) -> None:
            given.update(arguments[-1])

        def ask(self, *_: object, **__: object) -> None: ...
        def send(self, *_: object, **__: object) -> None: ...

    monkeypatch.setattr(contenders, "Worker", Recorder)
    monkeypatch.setattr(contenders, "python_of", lambda environment: OWN_PYTHON)
    folder = tmp_path if has_plugin else None
    variant = Variant("vllm", "", "module", environments.VLLM, plugins=folder)
    contenders.start(variant, tmp_path, "model", "float32", threads=1)
    assert given["VLLM_PLUGINS"] == ("reft" if has_plugin else "")
    assert given["PYTHONPATH"] == (str(tmp_path) if has_plugin else "")
