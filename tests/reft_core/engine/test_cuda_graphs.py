"""Recorded decode steps: buckets, padding, and that replays change nothing but the speed.

On a CPU the stand-in for a graph runs the step again, after it made sure that the step asks the
device for nothing and brings nothing to it, which is what keeps a step from being recorded.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reft_core.engine import cuda_graphs
from reft_core.engine import engine as engine_module
from reft_core.engine.attention import DecodeBatch, PrefillBatch, Segment
from reft_core.engine.config import EngineConfig, Forward
from reft_core.engine.cuda_graphs import Bucket, DecodeGraphs, doublings, recorder_for
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import Completion, generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.kv import SlotKV
from reft_core.engine.runner import ModelRunner
from tests.factories import (
    FAMILIES,
    assert_close,
    random_adapter,
    random_prompt,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import reference_generate

SLOTS, LENGTH = 5, 32
ROOT = Path(__file__).parents[3]
PARAMS = SamplingParams(max_tokens=7, temperature=0, ignore_eos=True)


class NoWaiting(TorchDispatchMode):
    """Refuses the operations that read a number of the device's, or bring it one."""

    _REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_pinned", "_pin_memory")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self._REFUSED, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class Recorder:
    """Stands for graphs where there are none."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        with NoWaiting():
            step()

        def replay() -> None:
            self.num_replays += 1
            step()

        return replay


def runner_with(
    record: Any, family: str = "llama", forward: Forward = "transformers"
) -> tuple[ModelRunner, SlotKV]:
    loaded = tiny_loaded(family)
    kv = SlotKV(
        loaded.description,
        SLOTS,
        LENGTH,
        dtype=torch.float32,
        device="cpu",
        spare=record is not None,
    )
    return ModelRunner(loaded, kv, forward, record=record), kv


def fill(runner: ModelRunner, kv: SlotKV, lengths: list[int]) -> None:
    """Prefill a random prompt of each length, one a slot."""
    for slot, length in enumerate(lengths):
        tokens = torch.tensor([random_prompt(length, slot)])
        batch = PrefillBatch(kv, [Segment(0, length, slot, 0)])
        with torch.inference_mode():
            runner._forward(tokens, torch.arange(length).unsqueeze(0), batch, 1)


def plain_decode(
    runner: ModelRunner, kv: SlotKV, tokens: list[int], positions: list[int]
) -> Tensor:
    at = torch.tensor(positions)
    with torch.inference_mode():
        batch = DecodeBatch(kv, at, max(positions) + 1)
        return runner._decode_plain(torch.tensor(tokens).unsqueeze(1), at.unsqueeze(1), batch)


def contents(kv: SlotKV) -> Tensor:
    """What the slots hold, the spare position left out."""
    return torch.stack([t[:, :, : kv.slot_len] for t in (*kv.keys, *kv.values)])


def test_doublings_end_with_the_last() -> None:
    assert doublings(1, 16) == (1, 2, 4, 8, 16)
    assert doublings(1, 5) == (1, 2, 4, 5)
    assert doublings(1, 1) == (1,)
    assert doublings(256, 2048) == (256, 512, 1024, 2048)
    assert doublings(256, 1000) == (256, 512, 1000)
    assert doublings(256, 100) == (100,)


@pytest.mark.parametrize(
    ("num_rows", "num_keys", "expected"),
    [
        (1, 1, (1, 8)),
        (3, 8, (4, 8)),
        (4, 9, (4, 16)),
        (5, 16, (5, 16)),
        (5, 17, (5, 32)),
        (2, 32, (2, 32)),
    ],
)
def test_a_step_goes_to_the_smallest_bucket_that_holds_it(
    num_rows: int, num_keys: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MIN_KEYS", 8)
    runner, _ = runner_with(Recorder())
    assert runner.graphs is not None
    assert runner.graphs.bucket_of(num_rows, num_keys) == Bucket(*expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_give_the_logits_and_the_keys_of_a_plain_step(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several numbers of rows and keys, each twice: what records, and what replays."""
    monkeypatch.setattr(cuda_graphs, "MIN_KEYS", 8)
    record = Recorder()
    runner, kv = runner_with(record, family)
    plain, other = runner_with(None, family)
    assert runner.graphs is not None
    lengths = [9, 4, 12, 5, 7]
    fill(runner, kv, lengths)
    fill(plain, other, lengths)
    for step, num_rows in enumerate([3, 1, 5, 4, 2, 3]):
        tokens = [3 + step + row for row in range(num_rows)]
        positions = [length + step for length in lengths[:num_rows]]
        before = record.num_replays
        found = runner.graphs.decode(tokens, positions)
        assert record.num_replays == before + 1
        expected = plain_decode(plain, other, tokens, positions)
        assert found is not None
        assert_close(found, expected)
        assert_close(contents(kv), contents(other))


def test_warm_up_records_all_buckets_and_leaves_every_slot_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "MIN_KEYS", 8)
    runner, kv = runner_with(Recorder())
    assert runner.graphs is not None
    assert len(runner.graphs) == 4 * 3  # 1, 2, 4, 5 rows; 8, 16, 32 keys
    assert runner.graphs.warm_up_s > 0
    assert not contents(kv).any()


def test_warm_up_is_bounded_in_time_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it left out is recorded on first use, as far as the number allows."""
    monkeypatch.setattr(cuda_graphs, "MIN_KEYS", 8)
    runner, kv = runner_with(None)
    other, spared = runner_with(Recorder())
    graphs = DecodeGraphs(other._decode_plain, spared, Recorder(), tolerance=1e-3, max_graphs=1)
    graphs.warm_up(seconds=-1)
    assert len(graphs) == 0
    fill(runner, kv, [3, 5])
    fill(other, spared, [3, 5])
    for _ in range(2):
        found = graphs.decode([4, 5], [3, 5])
        assert found is not None
        assert_close(found, plain_decode(runner, kv, [4, 5], [3, 5]))
        assert len(graphs) == 1
    assert graphs.decode([4], [3]) is None, "one graph was all it may record"
    graphs.warm_up()
    assert len(graphs) == 1


def test_padding_rows_touch_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots beyond the batch hold a half-prefilled prompt, or nothing."""
    runner, kv = runner_with(Recorder())
    assert runner.graphs is not None
    fill(runner, kv, [6, 6, 6, 4])
    before = contents(kv).clone()
    for _ in range(2):
        runner.graphs.decode([7, 8, 9], [6, 6, 6])
    after = contents(kv)
    assert_close(after[:, 3:], before[:, 3:], tolerance=0)
    assert not after[:, 4].any()
    assert_close(after[:, :3, :, :6], before[:, :3, :, :6], tolerance=0)


def test_a_recording_that_fails_leaves_the_plain_step(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_step: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    runner, kv = runner_with(fails)
    assert runner.graphs is not None
    assert len(runner.graphs) == 0
    assert caplog.text.count("no further decode graphs: recording Bucket(num_rows=5") == 1
    assert not contents(kv).any()
    assert runner.graphs.decode([3], [0]) is None


@pytest.mark.parametrize("fault", ["nothing", "other"])
def test_a_graph_that_repeats_something_else_is_not_kept(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A replay that does nothing, and one with other numbers."""
    runner, kv = runner_with(None)
    other, spared = runner_with(Recorder())
    found: list[Tensor] = []

    def forward(*args: Any) -> Tensor:
        logits = other._decode_plain(*args)
        return logits * 1.1 if found and fault == "other" else logits

    def record(step: Callable[[], None]) -> Callable[[], None]:
        found.append(torch.zeros(()))
        return step if fault == "other" else lambda: None

    graphs = DecodeGraphs(forward, spared, record, tolerance=1e-3)
    fill(runner, kv, [3])
    fill(other, spared, [3])
    logits = graphs.decode([4], [3])
    assert logits is not None
    assert_close(logits, plain_decode(runner, kv, [4], [3]))
    assert len(graphs) == 0
    assert "no further decode graphs: that of" in caplog.text
    assert graphs.decode([4], [4]) is None


def test_a_request_with_broken_numbers_does_not_end_recording() -> None:
    other, spared = runner_with(Recorder())
    graphs = DecodeGraphs(other._decode_plain, spared, Recorder(), tolerance=1e-3)
    fill(other, spared, [3, 3])
    spared.values[0][1, :, :3] = float("nan")
    for _ in range(2):
        logits = graphs.decode([4, 5], [3, 3])
        assert logits is not None
        assert logits[0].isfinite().all()
        assert not logits[1].isfinite().any()
    assert len(graphs) == 1


def test_only_a_cuda_device_records() -> None:
    assert recorder_for(torch.device("cpu"), True) is None
    assert recorder_for(torch.device("cuda", 0), False) is None


def through_engine(
    device: str, family: str, graphs: bool, forward: Forward = "auto"
) -> tuple[list[Completion], EmbeddedEngine]:
    """Mixed requests, more than slots, in chunks; one adapter edits generated tokens too."""
    loaded = tiny_loaded(family)
    loaded.model.to(device)
    config = EngineConfig(
        max_num_seqs=SLOTS,
        max_model_len=LENGTH,
        max_prefill_tokens=5,
        cuda_graphs=graphs,
        forward=forward,
    )
    engine = EmbeddedEngine(loaded, config)
    adapters = mixed(engine)
    for adapter in adapters[1:]:
        engine.load_adapter(adapter)
    requests = [
        Request(str(i), prompt, PARAMS, (AdapterChoice(adapter.digest),) if adapter else ())
        for i, (prompt, adapter) in enumerate(work(adapters))
    ]
    engine.start()
    try:
        return generate(engine, requests), engine
    finally:
        engine.stop()


def mixed(engine: EmbeddedEngine) -> list[Any]:
    model = engine.model
    return [
        None,
        random_adapter(model, seed=1, positions="f2+l2"),
        random_adapter(model, seed=2, method="lora", sites=("mlp_output",), phase="all"),
    ]


def work(adapters: list[Any]) -> list[tuple[tuple[int, ...], Any]]:
    lengths = [1, 9, 4, 17, 6, 2, 12, 8, 3, 5, 20, 7]
    chosen = [adapters[[0, 1, 0, 0, 2, 1][i % 6]] for i in range(len(lengths))]
    return [(random_prompt(n, n), adapter) for n, adapter in zip(lengths, chosen, strict=True)]


def expected_tokens(family: str, engine: EmbeddedEngine) -> list[list[int]]:
    model = tiny_model(family)
    return [
        reference_generate(model, prompt, PARAMS.max_tokens, adapter)
        for prompt, adapter in work(mixed(engine))
    ]


@pytest.mark.parametrize("forward", ["torch", "transformers"])
@pytest.mark.parametrize("min_keys", [4, 256])
def test_an_engine_that_replays_equals_the_reference(
    forward: Forward, min_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Recorder()
    monkeypatch.setattr(cuda_graphs, "MIN_KEYS", min_keys)
    monkeypatch.setattr(engine_module, "recorder_for", lambda *_args: record)
    completions, engine = through_engine("cpu", "llama", True, forward)
    stats = engine.stats()
    assert stats.num_decode_graphs == 4 * (4 if min_keys == 4 else 1)
    assert stats.warm_up_s > 0
    replays_at_start = stats.num_decode_graphs
    assert record.num_replays > replays_at_start, "decode replayed"
    assert record.num_replays < replays_at_start + stats.decode_steps_total, "edits did not"
    assert [c.token_ids for c in completions] == expected_tokens("llama", engine)
    assert not contents(engine._kv).any(), "memory that no sequence owns is zero"


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu_the_engine_equals_the_reference(family: str, graphs: bool) -> None:
    completions, engine = through_engine("cuda", family, graphs)
    assert (engine.stats().num_decode_graphs > 0) == graphs
    assert [c.token_ids for c in completions] == expected_tokens(family, engine)


@pytest.mark.gpu
@pytest.mark.parametrize("forward", ["auto", "transformers"])
def test_on_a_gpu_replays_give_the_logits_of_a_plain_step(
    forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MIN_KEYS", 8)
    loaded = tiny_loaded("llama")
    loaded.model.to("cuda")
    device = torch.device("cuda")
    kv = SlotKV(loaded.description, SLOTS, LENGTH, dtype=torch.float32, device=device, spare=True)
    runner = ModelRunner(loaded, kv, forward, record=recorder_for(device, True))
    assert runner.graphs is not None
    assert len(runner.graphs) == 4 * 3
    assert not contents(kv).any()
    for step, num_rows in enumerate([3, 1, 5, 4]):
        tokens = [3 + step + row for row in range(num_rows)]
        found = runner.graphs.decode(tokens, [step] * num_rows)
        assert found is not None
        found = found.clone()
        at = torch.tensor([step] * num_rows, device=device)
        with torch.inference_mode():
            expected = runner._decode_plain(
                torch.tensor(tokens, device=device).unsqueeze(1),
                at.unsqueeze(1),
                DecodeBatch(kv, at, step + 1),
            )
        assert_close(found, expected, tolerance=1e-4)
    assert len(runner.graphs) == 4 * 3, "all of it was recorded at start"


FAILING = """
import torch
from reft_core.engine.cuda_graphs import recorder_for

device = torch.device("cuda")
before = torch.cuda.current_stream()
record = recorder_for(device, True)
numbers = torch.ones(3, device=device)
try:
    record(lambda: numbers.mul_(numbers.sum().item()))
except Exception as error:
    assert "captur" in str(error), error
else:
    raise AssertionError("a step that waits for the device was recorded")
assert torch.cuda.current_stream() == before
assert numbers.sum().item() == 3
recorder_for(device, True)(lambda: numbers.add_(1))()
assert numbers.sum().item() == 6
"""


@pytest.mark.gpu
def test_on_a_gpu_a_step_that_waits_is_not_recorded() -> None:
    """And what follows works. In a process of its own, which the failure might leave broken."""
    run = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
