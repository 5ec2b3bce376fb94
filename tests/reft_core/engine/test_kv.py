"""Slots hold what is stored in them, move whole and clear whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reft_core.engine.kv import SlotKV
from tests.factories import assert_close, tiny_description

HEADS, LENGTH, WIDTH, LAYERS, SLOTS = 2, 6, 3, 2, 4


def empty_kv(dtype: torch.dtype = torch.float32) -> SlotKV:
    model = replace(tiny_description(), num_layers=LAYERS, num_kv_heads=HEADS, head_dim=WIDTH)
    return SlotKV(model, SLOTS, LENGTH, dtype=dtype, device="cpu")


def full_kv() -> SlotKV:
    """Every number of it differs."""
    kv = empty_kv()
    for index, tensor in enumerate((*kv.keys, *kv.values)):
        numbers = torch.arange(tensor.numel(), dtype=torch.float32).view_as(tensor)
        tensor.copy_(numbers + 1 + index * tensor.numel())
    return kv


def snapshot(kv: SlotKV) -> list[Tensor]:
    return [tensor.clone() for tensor in (*kv.keys, *kv.values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_zeroed(dtype: torch.dtype) -> None:
    kv = empty_kv(dtype)
    assert (kv.num_slots, kv.slot_len) == (SLOTS, LENGTH)
    assert len(kv.keys) == len(kv.values) == LAYERS
    for tensor in snapshot(kv):
        assert_close(tensor, torch.zeros(SLOTS, HEADS, LENGTH, WIDTH, dtype=dtype), tolerance=0)


def test_append_fills_positions_of_one_slot_and_layer() -> None:
    kv = full_kv()
    expected = snapshot(kv)
    key, value = torch.randn(2, HEADS, 2, WIDTH)
    kv.append(1, slot=2, start=3, key=key, value=value)
    expected[1][2, :, 3:5] = key
    expected[LAYERS + 1][2, :, 3:5] = value
    for found, wanted in zip(snapshot(kv), expected, strict=True):
        assert_close(found, wanted, tolerance=0)


def test_append_each_stores_one_token_a_slot_at_its_own_position() -> None:
    kv = full_kv()
    expected = snapshot(kv)
    positions = [5, 0, 3]
    key, value = torch.randn(2, 3, HEADS, WIDTH)
    kv.append_each(0, torch.tensor(positions), key, value)
    for slot, position in enumerate(positions):
        expected[0][slot, :, position] = key[slot]
        expected[LAYERS][slot, :, position] = value[slot]
    for found, wanted in zip(snapshot(kv), expected, strict=True):
        assert_close(found, wanted, tolerance=0)


@pytest.mark.parametrize("length", [0, 1, 4, LENGTH])
def test_move_copies_the_first_tokens_of_every_layer(length: int) -> None:
    kv = full_kv()
    before = snapshot(kv)
    kv.move(3, 1, length)
    for found, old in zip(snapshot(kv), before, strict=True):
        assert_close(found[1, :, :length], old[3, :, :length], tolerance=0)
        assert_close(found[[0, 2]], old[[0, 2]], tolerance=0)


@pytest.mark.parametrize("length", [0, 1, 4, LENGTH])
def test_clear_zeroes_the_first_tokens_of_one_slot_of_every_layer(length: int) -> None:
    """Also where they are NaN."""
    kv = full_kv()
    kv.keys[1][2, :, :length].fill_(float("nan"))
    before = snapshot(kv)
    kv.clear(2, length)
    for found, old in zip(snapshot(kv), before, strict=True):
        assert_close(found[2, :, :length], torch.zeros(HEADS, length, WIDTH), tolerance=0)
        assert_close(found[2, :, length:], old[2, :, length:], tolerance=0)
        assert_close(found[[0, 1, 3]], old[[0, 1, 3]], tolerance=0)
