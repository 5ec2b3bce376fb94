"""Every test starts from the same random state, and hypothesis draws the same examples.

Tests marked ``gpu`` are skipped where torch finds no CUDA device.
"""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
