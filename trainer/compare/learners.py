"""A contender made ready to train on a task, and what it leaves.

Each ``open_…`` is a context manager: while it is open the base is as the method needs it, and
afterwards it is what it was, bit for bit.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save
from torch import nn
from transformers import set_seed

from reft_core.adapter import Adapter, decode_adapter, encode_adapter
from reft_core.convert import BASE_TEMPLATE, ConvertOptions, convert
from trainer.causal import parts_of
from trainer.compare.baseline import BaselineModel
from trainer.compare.contenders import Contender
from trainer.compare.probe import ProbeModel
from trainer.compare.task import Task
from trainer.config import TrainConfig
from trainer.export import build_spec, check_finite
from trainer.fit import FitResult
from trainer.reft_model import ReftModel


@dataclass(frozen=True)
class Saved:
    """What a trained method would be shipped as."""

    num_bytes: int
    """Of its tensors' file."""
    adapter: Adapter | None
    """As our engine runs it; None for what is no adapter (a head, a whole model)."""


class Learner(Protocol):
    """One method on one task, before or after its training."""

    @property
    def model(self) -> Any:
        """What :func:`trainer.fit.fit` trains."""

    def save(self, fit: FitResult) -> Saved:
        """The result of a training."""


def open_learner(
    contender: Contender, config: TrainConfig, task: Task
) -> AbstractContextManager[Learner]:
    """``contender``, set as ``config`` says and drawn from its seed, on the base of ``task``."""
    opening = {"registry": _open_ours, "peft": _open_peft, "full": _open_full, "head": _open_head}
    return opening[contender.kind](contender, config, task)


@dataclass
class _Ours:
    """A method of our registry."""

    config: TrainConfig
    task: Task
    model: ReftModel

    def save(self, fit: FitResult) -> Saved:
        description = self.task.loaded.description
        parts = parts_of(self.config, description, self.model)
        check_finite(parts.edits, parts.prefix)
        metrics = {"valid_loss": fit.best.valid_loss, "base_valid_loss": fit.epochs[0].valid_loss}
        spec = build_spec(
            self.config, description, self.task.datasets, fit, metrics, "reft compare", parts
        )
        data = encode_adapter(spec, parts.edits, parts.prefix)
        return Saved(len(data), decode_adapter(data))


@contextmanager
def _open_ours(_contender: Contender, config: TrainConfig, task: Task) -> Iterator[Learner]:
    set_seed(config.seed)
    loaded = task.loaded
    model = ReftModel(
        loaded.model,
        config.placement(loaded.description),
        num_units=config.rule.num_units,
        prefixes=task.prefixes,
        virtual=config.virtual_tokens(loaded),
    )
    yield _Ours(config, task, model)


@dataclass
class _Peft:
    """A method of PEFT, brought into our file by our own converter."""

    config: TrainConfig
    task: Task
    model: BaselineModel

    def save(self, fit: FitResult) -> Saved:
        with tempfile.TemporaryDirectory() as scratch:
            wrapped: Any = self.model.wrapped
            wrapped.save_pretrained(scratch)
            options = ConvertOptions(
                base=self.task.loaded.description,
                name=self.config.name,
                template=self.config.template or BASE_TEMPLATE,
            )
            adapter = decode_adapter(convert(Path(scratch), "peft", options))
            return Saved((Path(scratch) / "adapter_model.safetensors").stat().st_size, adapter)


@contextmanager
def _open_peft(contender: Contender, config: TrainConfig, task: Task) -> Iterator[Learner]:
    from peft import PromptTuningConfig, get_peft_model

    set_seed(config.seed)
    base = task.loaded.model
    how = _peft_config(contender, config)
    wrapped: Any = _quietly(get_peft_model, base, how)
    num_virtual = config.prefix_length if isinstance(how, PromptTuningConfig) else 0
    try:
        yield _Peft(config, task, BaselineModel(base, wrapped, num_virtual))
    finally:
        if not how.is_prompt_learning:  # which changes no module of the base
            wrapped.unload()
        base.requires_grad_(False)
        if hasattr(base, "peft_config"):
            del base.peft_config


def _peft_config(contender: Contender, config: TrainConfig) -> Any:
    """PEFT's own defaults, but for what a comparison sets: sizes, α = 2r, no dropout."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType

    if contender.name == "peft_lora":
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=config.rank,
            lora_alpha=2 * config.rank,
            lora_dropout=0.0,
        )
    if contender.name == "peft_prefix_tuning":
        return PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=config.prefix_length
        )
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=config.prefix_length,
        prompt_tuning_init="SAMPLE_VOCAB",  # as arXiv 2104.08691, and as our own begins
    )


def _quietly(build: Any, *args: Any) -> nn.Module:
    """``build(*args)`` without PEFT's warnings about names that transformers will rename."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        built: nn.Module = build(*args)
        return built


@dataclass
class _Full:
    """The base's own parameters, all of them."""

    model: BaselineModel
    num_bytes: int

    def save(self, fit: FitResult) -> Saved:
        return Saved(self.num_bytes, None)


@contextmanager
def _open_full(_contender: Contender, config: TrainConfig, task: Task) -> Iterator[Learner]:
    """Trains float32 copies: steps this small are lost in bfloat16."""
    set_seed(config.seed)
    base = task.loaded.model
    kept = {parameter: parameter.data for parameter in base.parameters()}
    for parameter, data in kept.items():
        parameter.data = data.float().clone()
        parameter.requires_grad_(True)
    num_bytes = sum(data.nbytes for data in kept.values())
    try:
        yield _Full(BaselineModel(base, base), num_bytes)
    finally:
        for parameter, data in kept.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = data


@dataclass
class _Head:
    """A linear map of the frozen base's last hidden state."""

    model: ProbeModel

    def save(self, fit: FitResult) -> Saved:
        tensors = {name: t.contiguous() for name, t in self.model.head.state_dict().items()}
        return Saved(len(save(tensors)), None)


@contextmanager
def _open_head(_contender: Contender, config: TrainConfig, task: Task) -> Iterator[Learner]:
    set_seed(config.seed)
    yield _Head(ProbeModel(task.loaded.model, task.label_completions))
