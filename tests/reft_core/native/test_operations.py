"""The compiled loops compute what the same operations by torch do."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from reft_core.engine.attention import Copied, DecodeBatch, ForwardBatch, PrefillBatch, Segment
from reft_core.engine.kv import SlotKV
from reft_core.engine.linear import PackedLinear
from reft_core.engine.operations import HeadLayout, Operations
from reft_core.native.build import load_library
from reft_core.native.linear import NativeLinear
from reft_core.native.operations import NativeOperations
from tests.factories import assert_close, tiny_description

pytestmark = pytest.mark.skipif(load_library() is None, reason="no C++ compiler here")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Of bfloat16: torch rounds between the steps, the compiled loops only at the end."""


def native(dtype: torch.dtype, head_size: int = 8) -> Operations:
    found = NativeOperations.where_available(dtype, head_size)
    assert found is not None
    return found


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found.float(), expected.float(), TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (7, 16), (300, 96), (2, 3, 10)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    close(
        native(dtype).rms_norm(x, weight, 1e-5),
        Operations().rms_norm(x.float(), weight.float(), 1e-5),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1,), (32,), (70, 9, 9), (200, 120)])
def test_linear(dtype: torch.dtype, sizes: tuple[int, ...], bias: bool) -> None:
    """From one row to more than fill a tile, and outputs that fill no panel, one, and several."""
    maps = [nn.Linear(30, size, bias=bias, dtype=dtype).requires_grad_(False) for size in sizes]
    library = load_library()
    assert library is not None
    linear = NativeLinear(library, tuple(maps))
    for num_rows in (*range(1, 18), 50):
        x, other = torch.randn(num_rows, 30).to(dtype), torch.randn(num_rows, sum(sizes)).to(dtype)
        expected = torch.cat([each.float()(x.float()) for each in deepcopy(maps)], dim=1)
        close(linear(x), expected)
        before = other.clone()
        close(linear.plus(x, other), expected + other.float())
        assert torch.equal(other, before)
        assert torch.equal(linear(x)[-1:], linear(x[-1:])), "whatever stands beside a row"


@pytest.mark.parametrize("dtype", DTYPES)
def test_who_computes_linear_maps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of inputs makes no pairs of bfloat16, and matrices are another's trade."""
    odd, even = (nn.Linear(size, 4, dtype=dtype).requires_grad_(False) for size in (7, 8))
    is_whole = dtype == torch.float32
    assert isinstance(native(dtype).linear(odd), NativeLinear if is_whole else PackedLinear)
    library = SimpleNamespace(has_matrix_instructions=lambda: 1)
    assert NativeLinear.serves(library, even) is is_whole  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    """Also where e^x leaves float32's range."""
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-12, 12, 2399)])
    gate_up = torch.cat([gate, torch.randn(len(gate))]).expand(3, -1).contiguous().to(dtype)
    close(native(dtype).silu_mul(gate_up), Operations().silu_mul(gate_up.float()))


def filled_stores(
    dtype: torch.dtype, num_keys: int, head_size: int, slot_len: int
) -> tuple[SlotKV, SlotKV]:
    """Two stores of the same random numbers, the second in float32."""
    description = replace(tiny_description(), num_kv_heads=num_keys, head_dim=head_size)
    mine, exact = (
        SlotKV(description, 5, slot_len, dtype=some, device="cpu")
        for some in (dtype, torch.float32)
    )
    pairs = zip((*mine.keys, *mine.values), (*exact.keys, *exact.values), strict=True)
    for some, other in pairs:
        other.copy_(some.normal_())
    return mine, exact


def check_attention(
    dtype: torch.dtype,
    layout: HeadLayout,
    stores: tuple[SlotKV, SlotKV],
    batch_over: Callable[[SlotKV], ForwardBatch],
    num_rows: int,
) -> None:
    """Outputs and what is left in the slots equal torch's, taken in float32."""
    head_size = stores[0].keys[0].shape[-1]
    heads = torch.randn(num_rows, layout.num_queries + 2 * layout.num_keys, head_size).to(dtype)
    angles = torch.randn(num_rows, head_size // 2).repeat(1, 2)
    found, expected = (
        operations.attend(
            heads.to(kv.keys[0].dtype),
            layout,
            angles.cos(),
            angles.sin(),
            batch_over(kv),
            (1, num_rows),
        )
        for operations, kv in zip((native(dtype, head_size), Operations()), stores, strict=True)
    )
    close(found, expected)
    for mine, exact in zip(stores[0].keys, stores[1].keys, strict=True):
        close(mine, exact)
    for mine, exact in zip(stores[0].values, stores[1].values, strict=True):
        assert_close(mine.float(), exact, 0)


HEADS = [(6, 1), (64, 3), (80, 4), (128, 7)]
"""Head sizes, and queries per key from one to more than are read at once."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "per_key"), HEADS)
@pytest.mark.parametrize("window", [None, 4])
def test_decode_attention(
    dtype: torch.dtype, head_size: int, per_key: int, window: int | None
) -> None:
    """Contexts of every length, the first token and a full slot among them."""
    stores = filled_stores(dtype, 2, head_size, slot_len=24)
    layout = HeadLayout(1, per_key * 2, 2, head_size**-0.5, window)
    positions = torch.tensor([0, 3, 11, 23])
    check_attention(dtype, layout, stores, lambda kv: DecodeBatch(kv, positions, 24), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "per_key"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 5, 70])
def test_prefill_attention(
    dtype: torch.dtype, head_size: int, per_key: int, window: int | None
) -> None:
    """Whole prompts and later chunks, shorter and longer than a block of keys or a task."""
    stores = filled_stores(dtype, 2, head_size, slot_len=320)
    layout = HeadLayout(0, per_key * 2, 2, head_size**-0.5, window)
    sizes = [(0, 0, 1), (1, 0, 150), (2, 9, 64), (3, 63, 3), (4, 130, 190)]
    segments, num_rows = [], 0
    for slot, first_position, length in sizes:
        segments.append(Segment(num_rows, num_rows + length, slot, first_position))
        num_rows += length
    check_attention(dtype, layout, stores, lambda kv: PrefillBatch(kv, segments), num_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_attention_over_copied_keys(dtype: torch.dtype) -> None:
    """Copies come after what is stored, one after the other, and before attention."""
    stores = filled_stores(dtype, 2, 64, slot_len=40)
    layout = HeadLayout(0, 6, 2, 0.125, None)
    segments = [Segment(0, 20, 0, 5), Segment(20, 24, 1, 20), Segment(24, 25, 2, 24)]
    copied = [Copied(0, 1, 3, 20), Copied(1, 2, 0, 24)]
    check_attention(dtype, layout, stores, lambda kv: PrefillBatch(kv, segments, copied), 25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "per_key"), HEADS)
@pytest.mark.parametrize("window", [None, 5, 70, 150])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_prefill_attention_over_keys_that_segments_share(
    dtype: torch.dtype, head_size: int, per_key: int, window: int | None, threads: int
) -> None:
    """Short segments beside long ones; they share blocks of keys, parts of one, or none, and make
    families of every size."""
    stores = filled_stores(dtype, 2, head_size, slot_len=320)
    for kv in stores:
        for tensor in (*kv.keys, *kv.values):
            tensor[1:4, :, :200] = tensor[0, :, :200]
    sizes = [(0, 200, 7, 0), (1, 200, 5, 200), (2, 201, 64, 130), (3, 190, 1, 70), (4, 200, 9, 0)]
    sizes += [(4, 209, 90, 0), (4, 299, 1, 299), (4, 300, 2, 300), (0, 207, 3, 0), (1, 205, 3, 63)]
    segments, num_rows = [], 0
    for slot, first_position, length, num_shared in sizes:
        end = num_rows + length
        segments.append(Segment(num_rows, end, slot, first_position, num_shared))
        num_rows = end
    layout = HeadLayout(0, per_key * 2, 2, head_size**-0.5, window)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_attention(dtype, layout, stores, lambda kv: PrefillBatch(kv, segments), num_rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    operations = native(torch.float32)
    x = torch.randn(2, 8)
    x[1, 3] = bad
    normed = operations.rms_norm(x, torch.ones(8), 1e-5)
    assert torch.isfinite(normed[0]).all()
    assert not torch.isfinite(normed[1]).all()
    gated = operations.silu_mul(torch.cat([x, torch.ones(2, 8)], dim=1))
    assert torch.isfinite(gated[0]).all()
    assert bad == -torch.inf or not torch.isfinite(gated[1]).all()  # silu(-inf) is 0


def test_a_nan_among_the_keys_reaches_its_own_sequence_only() -> None:
    kv = SlotKV(tiny_description(), 2, 16, dtype=torch.float32, device="cpu")
    kv.keys[0][1, 0, 2, 5] = torch.nan
    num_keys, head_size = kv.keys[0].shape[1], kv.keys[0].shape[3]
    layout = HeadLayout(0, 2 * num_keys, num_keys, 1.0, None)
    heads = torch.randn(2, 4 * num_keys, head_size)
    angles = torch.ones(2, head_size)
    batch = DecodeBatch(kv, torch.tensor([4, 4]), 5)
    found = native(torch.float32, head_size).attend_decode(heads, layout, angles, angles, batch)
    assert torch.isfinite(found[0]).all()
    assert torch.isnan(found[1]).any()


def test_head_sizes_and_dtypes_it_does_not_serve() -> None:
    assert NativeOperations.where_available(torch.float16, 64) is None
    assert NativeOperations.where_available(torch.float32, 512) is None
    assert NativeOperations.where_available(torch.float32, 7) is None
