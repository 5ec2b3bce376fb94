"""A packed prefill in one kernel: its indices, when it serves, and that it equals the loop.

The kernel itself needs a GPU. Elsewhere arithmetic written out stands in for it.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_core.engine import varlen
from reft_core.engine.attention import Copied, NewTokens, PrefillBatch, Segment
from reft_core.engine.kv import SlotKV
from tests.factories import assert_close, tiny_description

HEADS, KEY_HEADS, WIDTH, LENGTH, SLOTS = 6, 2, 8, 12, 4
SEGMENTS = [Segment(0, 5, 2, 0), Segment(5, 6, 0, 7), Segment(6, 9, 3, 3)]
SPANS = [(2, 0, 5), (0, 7, 1), (3, 3, 3)]


def test_indices_of_rows_and_keys() -> None:
    at = varlen.ragged(SPANS, (), "cpu")
    assert (at.num_queries, at.num_keys) == ((5, 1, 3), (5, 8, 6))
    assert at.query_ends.tolist() == [0, 5, 6, 9]
    assert at.key_ends.tolist() == [0, 5, 13, 19]
    assert at.query_ends.dtype == at.key_ends.dtype == torch.int32
    assert at.rows.tolist() == [[2] * 5 + [0] + [3] * 3, [0, 1, 2, 3, 4, 7, 3, 4, 5]]
    assert at.keys is not None
    slots = [2] * 5 + [0] * 8 + [3] * 6
    assert at.keys.tolist() == [slots, [*range(5), *range(8), *range(6)]]
    assert at.copied_from is None
    assert at.copied_to is None


def test_prompts_from_their_start_gather_nothing() -> None:
    at = varlen.ragged([(1, 0, 4), (0, 0, 2)], (), "cpu")
    assert at.num_queries == at.num_keys == (4, 2)
    assert at.keys is None


def test_a_copy_of_a_copy_reads_what_that_one_read() -> None:
    at = varlen.ragged([(0, 0, 4)], [(0, 1, 0, 3), (1, 2, 1, 3), (3, 1, 2, 4)], "cpu")
    assert at.copied_from is not None
    assert at.copied_to is not None
    assert at.copied_to.tolist() == [[1, 1, 1, 1, 2, 2], [0, 1, 2, 3, 1, 2]]
    assert at.copied_from.tolist() == [[0, 0, 3, 3, 0, 0], [0, 1, 2, 3, 1, 2]]


def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """``varlen_attn`` of torch 2.12 on, for causal attention, by a loop over queries."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size[1] == 0, "not causal"
    starts, key_starts = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert max_q == max(b - a for a, b in itertools.pairwise(starts))
    assert max_k == max(b - a for a, b in itertools.pairwise(key_starts))
    out = torch.empty_like(query)
    for segment in range(len(starts) - 1):
        last_key = key_starts[segment + 1] - 1
        for row in range(starts[segment], starts[segment + 1]):
            own = last_key - (starts[segment + 1] - 1 - row)
            first = key_starts[segment]
            if window_size[0] >= 0:
                first = max(first, own - window_size[0])
            for head in range(query.shape[1]):
                kv_head = head * key.shape[1] // query.shape[1]
                weights = (scale * key[first : own + 1, kv_head] @ query[row, head]).softmax(0)
                out[row, head] = weights @ value[first : own + 1, kv_head]
    return out


def old_stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The same with the arguments of torch 2.11."""
    rest = {"scale": scale, "window_size": window_size}
    return stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **rest)  # type: ignore[arg-type]


def kernel_of(function: Any) -> varlen.Kernel:
    found = varlen.Kernel.of(function)
    assert found is not None
    return found


def filled_kv(device: str = "cpu", dtype: torch.dtype = torch.float32) -> SlotKV:
    """Slots full of numbers, as if whatever stands there had been computed before."""
    model = replace(tiny_description(), num_layers=1, num_kv_heads=KEY_HEADS, head_dim=WIDTH)
    kv = SlotKV(model, SLOTS, LENGTH, dtype=dtype, device=device)
    kv.keys[0].normal_()
    kv.values[0].normal_()
    return kv


@pytest.mark.parametrize("function", [stand_in, old_stand_in])
@pytest.mark.parametrize("window", [None, 2, 4, 100])
@pytest.mark.parametrize(
    ("segments", "copied"),
    [
        (SEGMENTS, []),
        ([Segment(0, 6, 1, 0), Segment(6, 9, 0, 0)], []),
        ([Segment(0, 6, 1, 0), Segment(6, 9, 0, 6)], [Copied(1, 0, 0, 6)]),
        (
            [Segment(0, 6, 1, 2), Segment(6, 8, 0, 5), Segment(8, 9, 2, 6)],
            [Copied(1, 0, 0, 5), Copied(0, 2, 0, 5), Copied(3, 2, 5, 6)],
        ),
    ],
)
def test_equals_the_loop_over_segments(
    function: Any,
    window: int | None,
    segments: list[Segment],
    copied: list[Copied],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = filled_kv(), filled_kv()
    for to, of in zip((*other.keys, *other.values), (*one.keys, *one.values), strict=True):
        to.copy_(of)
    num_rows = segments[-1].end
    query = torch.randn(1, HEADS, num_rows, WIDTH)
    key, value = torch.randn(2, 1, KEY_HEADS, num_rows, WIDTH)
    new = NewTokens(0, query, key, value, 0.3, window)
    expected = PrefillBatch(one, segments, copied).attend(new)
    monkeypatch.setattr(varlen, "serves", lambda *_args: True)
    monkeypatch.setattr(varlen, "kernel", lambda: kernel_of(function))
    found = PrefillBatch(other, segments, copied).attend(new)
    assert_close(found, expected)
    assert_close(other.keys[0], one.keys[0], tolerance=0)
    assert_close(other.values[0], one.values[0], tolerance=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("function", [stand_in, old_stand_in])
def test_a_right_kernel_passes_its_trial(function: Any, window: int | None) -> None:
    heads = (HEADS, KEY_HEADS, WIDTH)
    error = varlen.largest_error(
        kernel_of(function), torch.device("cpu"), torch.float32, heads, window
    )
    assert error < 1e-5


@pytest.mark.parametrize("change", ["window", "scale", "alignment"])
def test_a_wrong_kernel_fails_its_trial(change: str) -> None:
    def wrong(*args: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        if change == "window":
            window_size = (window_size[0] + 1, 0)
        if change == "scale":
            scale *= 1.5
        if change == "alignment":  # queries at the first keys instead of the last
            args = (*args[:4], args[4] - torch.tensor([0, 0, 1]).int(), *args[5:])
            args = (*args[:6], args[6] - 1)
        rest: dict[str, Any] = {"window_size": window_size, "enable_gqa": enable_gqa}
        return stand_in(*args, scale=scale, **rest)

    heads = (HEADS, KEY_HEADS, WIDTH)
    error = varlen.largest_error(kernel_of(wrong), torch.device("cpu"), torch.float32, heads, 3)
    assert error > 2 * varlen._TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "head_dim", "softcap", "expected"),
    [
        (torch.bfloat16, 64, None, True),
        (torch.float16, 256, None, True),
        (torch.float32, 64, None, False),
        (torch.bfloat16, 264, None, False),
        (torch.bfloat16, 60, None, False),
        (torch.bfloat16, 64, 50.0, False),
    ],
)
def test_what_flash_attention_takes(
    dtype: torch.dtype, head_dim: int, softcap: float | None, expected: bool
) -> None:
    assert varlen.fits(dtype, head_dim, softcap) == expected


def test_it_does_not_serve_a_cpu() -> None:
    half = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not varlen.serves(half, half, None, None)


def test_arguments_of_the_installed_release() -> None:
    """What the kernel is called with exists, whatever release of torch this is."""
    found = varlen.kernel()
    assert found is not None
    parameters = inspect.signature(found.function).parameters
    assert list(parameters)[:7] == [
        "query",
        "key",
        "value",
        "cu_seq_q",
        "cu_seq_k",
        "max_q",
        "max_k",
    ]
    for name in ("scale", "window_size"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert found.takes_gqa == ("enable_gqa" in parameters)


def test_a_release_that_cannot_be_told_to_be_causal_has_none() -> None:
    assert varlen.Kernel.of(lambda query, key, value, is_causal: query) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_the_kernel_serves_half_precision(
    dtype: torch.dtype, head_dim: int, heads: tuple[int, int], window: int | None
) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    found = varlen.kernel()
    assert found is not None
    error = varlen.largest_error(found, torch.device("cuda"), dtype, (*heads, head_dim), window)
    assert error < varlen._TOLERANCE
    query, key = (torch.zeros(1, n, 4, head_dim, dtype=dtype, device="cuda") for n in heads)
    assert varlen.serves(query, key, window, None)
    assert not varlen.serves(query.float(), key.float(), window, None)
    assert not varlen.serves(query, key, window, 50.0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_it_equals_the_loop_over_segments(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (filled_kv("cuda", torch.bfloat16) for _ in range(2))
    for to, of in zip((*other.keys, *other.values), (*one.keys, *one.values), strict=True):
        to.copy_(of)
    query = torch.randn(1, HEADS, 9, WIDTH, device="cuda").bfloat16()
    key, value = torch.randn(2, 1, KEY_HEADS, 9, WIDTH, device="cuda").bfloat16()
    new = NewTokens(0, query, key, value, 0.3, window)
    found = PrefillBatch(other, SEGMENTS).attend(new)
    monkeypatch.setattr(varlen, "serves", lambda *_args: False)
    expected = PrefillBatch(one, SEGMENTS).attend(new)
    assert_close(found.float(), expected.float(), tolerance=0.02)
    assert_close(other.keys[0], one.keys[0], tolerance=0)
