"""Every test starts from the same random state, and hypothesis draws the same examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "reft", deadline=None, derandomize=True, database=None, max_examples=60, print_blob=False
)
settings.load_profile("reft")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
