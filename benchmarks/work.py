"""What benchmarks of the engine alone ask of it: random prompts under random adapters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from reft_core.adapter import Adapter, EditKey, decode_adapter, encode_adapter
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.methods import Intervention
from reft_core.methods.placement import Placement
from reft_core.sites import ModelDescription
from reft_core.spec import AdapterSpec, PositionSpec

_ids = itertools.count()


def random_prompts(
    model: ModelDescription, count: int, length: int, seed: int = 0
) -> list[list[int]]:
    """``count`` prompts of ``length`` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.vocab_size, (count, length), generator=generator)
    prompts: list[list[int]] = tokens.tolist()
    return prompts


def greedy_requests(
    prompts: Iterable[Sequence[int]], output_tokens: int, digests: Sequence[str] = ()
) -> list[Request]:
    """Greedy requests for so many tokens, which use the adapters of these digests in turn."""
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    return [
        Request(
            f"bench-{next(_ids)}",
            tuple(prompt),
            params,
            (AdapterChoice(digests[i % len(digests)]),) if digests else (),
        )
        for i, prompt in enumerate(prompts)
    ]


def fresh_adapter(
    model: ModelDescription,
    method: str,
    positions: PositionSpec,
    *,
    layers: Iterable[int],
    rank: int,
    sites: tuple[str, ...] | None = None,
) -> tuple[AdapterSpec, dict[EditKey, Intervention]]:
    """An adapter as training finds it: its spec, and the interventions it is made of."""
    placement = Placement.on(model, method, layers=tuple(layers), rank=rank, sites=sites)
    spec = AdapterSpec(
        name="random",
        base=model.to_base_spec(),
        method=method,
        positions=positions,
        sites=placement.site_specs(),
    )
    return spec, placement.build(positions.to_rule().num_units)


def random_adapter(
    model: ModelDescription, rank: int, seed: int, rule: str = "f7+l7", first_layer: int = 0
) -> Adapter:
    """A LoReFT adapter in all layers from one on, whose edits are small but not zero."""
    return decode_adapter(_random_adapter_bytes(model, rank, seed, rule, first_layer, noise=0.01))


def write_random_adapters(
    folder: Path,
    model: ModelDescription,
    rank: int,
    count: int,
    rule: str = "f7+l7",
    first: int = 0,
) -> None:
    """So many random adapters as ``0.safetensors``, ``1.safetensors``, … in ``folder``, or from
    ``first`` on. Their edits are large enough to change answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        data = _random_adapter_bytes(model, rank, seed, rule, first_layer=0, noise=1.0)
        (folder / f"{seed}.safetensors").write_bytes(data)


def _random_adapter_bytes(
    model: ModelDescription, rank: int, seed: int, rule: str, first_layer: int, noise: float
) -> bytes:
    torch.manual_seed(seed)
    layers = range(first_layer, model.num_layers)
    positions = PositionSpec(rule=rule)
    spec, modules = fresh_adapter(model, "loreft", positions, layers=layers, rank=rank)
    for module in modules.values():
        for parameter in module.parameters():
            parameter.data.add_(noise * torch.randn_like(parameter) / model.hidden_size**0.5)
    return encode_adapter(spec, {k: m.to_edit() for k, m in modules.items()})
