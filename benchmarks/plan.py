"""How much of everything the two commands run.

Both are cut to the minutes they promise: five for the quick one once peers are installed, about
45 for the full one, on two cores with AVX-512 and a model of 135M parameters. ``expected_s`` is
what the sections of ``results/engine-full.json`` and ``engine-quick.json`` took, rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from benchmarks.adapter_tax import Regime
from reft_core.loading import Dtype

HEADLINE = "a"
"""The workload of the summary's ratios and of the correctness gate."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one run of :mod:`engine`."""

    name: str
    variants: Mapping[Dtype, tuple[str, ...]]
    """Who takes part in a dtype, by the variant's name."""
    repeats: Mapping[Dtype, Mapping[str, int]]
    """Of each workload, by dtype; a workload that is not named is not run."""
    trials: int
    """Runs of each variant and setting before the fastest is taken; 0 takes the first."""
    tax: Regime
    roofline: Mapping[Dtype, int]
    """Repeats by dtype."""
    expected_s: Mapping[str, int]
    """About how long each section takes; one that is not named is left out."""
    peer_tax_repeats: int = 0
    peer_tax_adapters: tuple[int, ...] = ()
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Measurements that are commands of their own, with their options."""

    @property
    def has_gate(self) -> bool:
        """Whether the workload is run whose float32 tokens are judged."""
        return HEADLINE in self.repeats["float32"]

    def only(self, workloads: Sequence[str]) -> Self:
        """The same with fewer workloads."""
        kept = {
            dtype: {name: count for name, count in counts.items() if name in workloads}
            for dtype, counts in self.repeats.items()
        }
        return replace(self, repeats=kept)


TAX_COUNTS = (1, 16, 64, 256)

_MAIN = ("reft", "vllm-eager", "llamacpp", "transformers_static")

FULL = Plan(
    name="full",
    variants={
        "bfloat16": (*_MAIN, "vllm-compiled", "transformers_continuous"),
        "float32": _MAIN,
    },
    repeats={
        "bfloat16": dict.fromkeys("abcd", 5),
        "float32": dict.fromkeys("abcd", 5),
    },
    trials=1,
    # Half the tokens of workload a: 256 adapters need 256 requests.
    tax=Regime(
        dtype="bfloat16",
        slots=64,
        requests=256,
        input_tokens=32,
        output_tokens=32,
        repeats=7,
        adapters=TAX_COUNTS,
    ),
    roofline={"bfloat16": 5, "float32": 5},
    peer_tax_repeats=2,
    peer_tax_adapters=(16, 64),
    others={"residency": (), "fanout": ("--cases", "suffix", "--dtype", "bfloat16")},
    expected_s={
        "throughput": 1800,
        "tax": 400,
        "peer-tax": 300,
        "roofline": 90,
        "residency": 120,
        "fanout": 50,
    },
)

QUICK = Plan(
    name="quick",
    # The gate needs transformers in float32; of the others only llama.cpp loads in no time.
    variants={"bfloat16": _MAIN, "float32": ("reft", "llamacpp", "transformers_static")},
    repeats={"bfloat16": {"a": 3}, "float32": {"a": 1}},
    trials=0,
    tax=Regime(dtype="bfloat16", repeats=2, adapters=(1, 16)),
    roofline={"bfloat16": 2},
    expected_s={"throughput": 160, "tax": 20, "roofline": 20},
)
