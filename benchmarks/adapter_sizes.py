"""How large adapters are on models of all sizes, by arithmetic: the tables of docs/scaling.md.

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


@dataclass(frozen=True)
class Split:
    """A model over GPUs of 80 GiB, of which vLLM may take a share for weights, KV and work space.
    Adapters are beside that share: vLLM does not count them.
    """

    shape: Shape
    num_parameters: float
    tensor_parallel: int
    pipeline_parallel: int = 1

    @property
    def weights_gib(self) -> float:
        """On each GPU, in 16 bits."""
        return self.num_parameters * 2 / self.num_gpus / _GIB

    @property
    def num_gpus(self) -> int:
        """Of one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def kv_tokens(self) -> int:
        """What is left of vLLM's share for keys and values, if work space took nothing."""
        left = VLLM_SHARE * GPU_GIB - self.weights_gib
        return int(left * _GIB * self.num_gpus / self.shape.kv_bytes)

    def num_adapters(self, rank: int) -> int:
        """On each GPU: whole in every tensor-parallel rank, by layers over the pipeline."""
        part = self.shape.adapter_bytes(rank) // self.pipeline_parallel
        return ADAPTERS_GIB * _GIB // part


GPU_GIB, VLLM_SHARE, ADAPTERS_GIB = 80, 0.8, 8

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


_BY_NAME = {shape.name: shape for shape in SHAPES}
SPLITS = (
    Split(_BY_NAME["Llama-3-8B"], 8.03e9, 1),
    Split(_BY_NAME["Qwen2.5-32B"], 32.8e9, 2),
    Split(_BY_NAME["Llama-3-70B, Qwen2.5-72B"], 72.7e9, 4),
    Split(_BY_NAME["Llama-3.1-405B"], 405.9e9, 8, 2),
)


def splits() -> str:
    """Models over GPUs as Markdown."""
    rows = [
        "| model | GPUs: tensor × pipeline | weights a GPU | KV of a copy "
        "| adapters of rank 4 on a GPU | copies on 8 GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for split in SPLITS:
        copies = 8 // split.num_gpus
        rows.append(
            f"| {split.shape.name} | {split.tensor_parallel} × {split.pipeline_parallel} "
            f"| {split.weights_gib:.0f} GiB | {split.kv_tokens / 1000:,.0f},000 tokens "
            f"| {split.num_adapters(4):,} | {copies or 'half of one'} |"
        )
    return "\n".join(rows)


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
    print(table(), splits(), sep="\n\n")
