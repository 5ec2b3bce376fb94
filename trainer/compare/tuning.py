"""A base whose own parameters are trained, and PEFT's parts in a base, of whatever kind.

Each function is a context manager: afterwards the base is what it was, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from trainer.compare.contenders import Contender
from trainer.compare.settings import linear_sites
from trainer.compare.task import Task
from trainer.config import TrainConfig


@contextmanager
def all_of(base: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """While open, the base's parameters are float32 copies: small steps are lost in bfloat16."""
    kept = {parameter: parameter.data for parameter in base.parameters()}
    for parameter, data in kept.items():
        parameter.data = data.float().clone()
    try:
        yield list(kept)
    finally:
        for parameter, data in kept.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = data


@contextmanager
def peft_in(contender: Contender, config: TrainConfig, task: Task) -> Iterator[Any]:
    """While open, the base is inside the PEFT model that this gives.

    Its parameters that require gradients are PEFT's, drawn from the seed.
    """
    from peft import get_peft_model

    set_seed(config.seed)
    base = task.loaded.model
    how = _peft_config(contender, config, task)
    with warnings.catch_warnings():
        # PEFT's, about names that transformers will rename.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: Any = get_peft_model(base, how)
    try:
        yield wrapped
    finally:
        if not how.is_prompt_learning:  # which changes no module of the base
            wrapped.unload()
        base.requires_grad_(False)
        if hasattr(base, "peft_config"):
            del base.peft_config


def _peft_config(contender: Contender, config: TrainConfig, task: Task) -> Any:
    """PEFT's own defaults, but for what a comparison sets: sizes, α = 2r, no dropout.

    PEFT knows few encoders' maps, so that there ours are named to it.
    """
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType

    # An encoder's head is ours, so that PEFT need not know what it is for.
    kinds = {"causal": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM}
    task_type = kinds.get(task.kind)
    if contender.name == "peft_lora":
        maps = {site.rpartition(".")[2] for site in linear_sites(task.loaded.description, "lora")}
        return LoraConfig(
            task_type=task_type,
            r=config.rank,
            lora_alpha=2 * config.rank,
            lora_dropout=0.0,
            target_modules=sorted(maps) if task.kind == "encoder" else None,
        )
    if contender.name == "peft_prefix_tuning":
        return PrefixTuningConfig(task_type=task_type, num_virtual_tokens=config.prefix_length)
    return PromptTuningConfig(
        task_type=task_type,
        num_virtual_tokens=config.prefix_length,
        prompt_tuning_init="SAMPLE_VOCAB",  # as arXiv 2104.08691, and as our own begins
    )
