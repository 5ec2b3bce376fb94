"""When two ways of computing the same logits count as the same."""

from __future__ import annotations

import math

import pytest
import torch

from reft_core.agreement import TOLERANCE, disagreement

EXPECTED = torch.tensor([[8.0, -2.0], [1.0, 4.0], [0.0, -6.0]])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_difference_at_every_token_is_relative_to_the_largest_logit(dtype: torch.dtype) -> None:
    assert disagreement(EXPECTED, EXPECTED, dtype) == 0
    assert disagreement(EXPECTED + 2, EXPECTED, dtype) == 0.25
    assert disagreement(EXPECTED.to(dtype) - 2, EXPECTED.to(dtype), dtype) == 0.25


def test_one_token_far_off_counts_in_float32_alone() -> None:
    found = EXPECTED.clone()
    found[1, 0] += 4
    assert disagreement(found, EXPECTED, torch.float32) == 0.5
    assert disagreement(found, EXPECTED, torch.bfloat16) == 0
    found[2, 1] -= 2
    assert disagreement(found, EXPECTED, torch.bfloat16) == 0.25


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_logits_that_are_no_numbers_have_no_difference(dtype: torch.dtype) -> None:
    assert math.isnan(disagreement(EXPECTED * math.nan, EXPECTED, dtype))
