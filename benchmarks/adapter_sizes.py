"""How large adapters are on models of all sizes, by arithmetic: the table of docs/scaling.md.

usage: python -m benchmarks.adapter_sizes
"""

from __future__ import annotations

from dataclasses import dataclass

_BYTES = 4
"""Of a number of an adapter: float32 on the device, whatever the model's dtype."""
_KV_BYTES = 2
_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's config that sizes depend on."""

    name: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def adapter_bytes(self, rank: int, num_units: int = 1) -> int:
        """Tensors of a LoReFT adapter on all layers, as it is folded: down (d, r), up (r, d) and
        bias (r,) a layer and unit. How many positions it edits does not enter.
        """
        return self.num_layers * num_units * (2 * self.hidden_size + 1) * rank * _BYTES

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token, in 16 bits."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * _KV_BYTES


SHAPES = (
    Shape("SmolLM2-135M", 576, 30, 3, 64),
    Shape("Qwen2.5-0.5B", 896, 24, 2, 64),
    Shape("Llama-3.2-1B", 2048, 16, 8, 64),
    Shape("Qwen2.5-7B", 3584, 28, 4, 128),
    Shape("Llama-3-8B", 4096, 32, 8, 128),
    Shape("Qwen2.5-32B", 5120, 64, 8, 128),
    Shape("Llama-3-70B, Qwen2.5-72B", 8192, 80, 8, 128),
    Shape("Llama-3.1-405B", 16384, 126, 8, 128),
)
RANKS = (1, 4, 8)


def table() -> str:
    """The sizes as Markdown."""
    ranks = " | ".join(f"rank {rank}" for rank in RANKS)
    rows = [
        f"| model | hidden size × layers | KV a token | {ranks} | of rank 4 in 1 GiB "
        "| one of rank 4, in tokens of KV |",
        "|---|---|---|" + "---|" * (len(RANKS) + 2),
    ]
    for shape in SHAPES:
        sizes = " | ".join(_shown(shape.adapter_bytes(rank)) for rank in RANKS)
        of_four = shape.adapter_bytes(4)
        rows.append(
            f"| {shape.name} | {shape.hidden_size:,} × {shape.num_layers} "
            f"| {_shown(shape.kv_bytes)} | {sizes} | {_GIB // of_four:,} "
            f"| {of_four / shape.kv_bytes:.0f} |"
        )
    return "\n".join(rows)


def _shown(num_bytes: int) -> str:
    """In kB or MB, of a thousand and a million bytes."""
    if num_bytes < 1_000_000:
        return f"{num_bytes / 1000:.0f} kB"
    return f"{num_bytes / 1_000_000:.1f} MB"


if __name__ == "__main__":
    print(table())
