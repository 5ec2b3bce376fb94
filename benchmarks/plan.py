"""How much of everything the two commands run."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.adapter_tax import Regime
from reft_core.loading import Dtype


@dataclass(frozen=True)
class Plan:
    """Sizes of one run of :mod:`engine`."""

    name: str
    repeats: dict[Dtype, dict[str, int]]
    """Of each workload, by dtype; a workload that is not named is not run."""
    trials: int
    """Runs of each variant and setting before the fastest is taken; 0 takes the first."""
    all_variants: bool
    tax: Regime
    peer_tax_repeats: int
    """0 leaves the peers' adapters out."""
    roofline: dict[Dtype, int] = field(default_factory=dict)
    """Repeats by dtype."""
    others: bool = True
    """Whether measurements that are modules of their own are run too."""


TAX_COUNTS = (1, 16, 64, 256)

FULL = Plan(
    name="full",
    repeats={
        "bfloat16": {"a": 7, "b": 5, "c": 5, "d": 5},
        "float32": {"a": 5, "b": 3, "c": 3, "d": 3},
    },
    trials=1,
    all_variants=True,
    tax=Regime(dtype="bfloat16", slots=64, requests=256, repeats=5, adapters=TAX_COUNTS),
    peer_tax_repeats=2,
    roofline={"bfloat16": 5, "float32": 5},
)

QUICK = Plan(
    name="quick",
    repeats={"bfloat16": {"a": 5, "d": 5}, "float32": {"a": 5}},
    trials=0,
    all_variants=False,
    tax=Regime(
        dtype="bfloat16",
        slots=64,
        requests=256,
        input_tokens=32,
        output_tokens=8,
        repeats=1,
        adapters=TAX_COUNTS,
    ),
    peer_tax_repeats=0,
    roofline={"bfloat16": 2},
    others=False,
)
