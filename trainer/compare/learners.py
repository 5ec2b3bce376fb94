"""A contender made ready to train on a task, and what it leaves.

Each ``open_…`` is a context manager: while it is open the base is as the method needs it, and
afterwards it is what it was, bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save
from torch import nn
from transformers import set_seed

from reft_core.adapter import Adapter, decode_adapter, encode_adapter
from reft_core.convert import BASE_TEMPLATE, ConvertOptions, convert
from reft_core.spec import AdapterSpec
from trainer.compare import tuning
from trainer.compare.baseline import BaselineModel
from trainer.compare.contenders import Contender
from trainer.compare.probe import ProbeModel
from trainer.compare.task import Task
from trainer.config import TrainConfig
from trainer.export import build_spec, check_finite
from trainer.fit import FitResult
from trainer.task import TrainedModel


@dataclass(frozen=True)
class Saved:
    """What a trained method would be shipped as."""

    num_bytes: int
    """Of its tensors' file."""
    file: bytes | None = None
    """The adapter file that we serve; None for what is no adapter (a causal model's head, a whole
    model)."""
    num_by_side: tuple[int, int] | None = None
    """Parameters in an encoder-decoder's encoder and in its decoder, of what is in both."""

    @cached_property
    def adapter(self) -> Adapter | None:
        """What the file holds."""
        return None if self.file is None else decode_adapter(self.file)


class Learner(Protocol):
    """One method on one task, before or after its training."""

    @property
    def model(self) -> Any:
        """What :func:`trainer.fit.fit` trains."""

    def save(self, fit: FitResult) -> Saved:
        """The result of a training."""


Opening = Callable[[Contender, TrainConfig, Task], AbstractContextManager[Learner]]


def open_learner(
    contender: Contender, config: TrainConfig, task: Task
) -> AbstractContextManager[Learner]:
    """``contender``, set as ``config`` says and drawn from its seed, on the base of ``task``."""
    opening: dict[str, Opening] = {
        "registry": _open_ours,
        "peft": _open_peft,
        "full": _open_full,
        # An encoder's head is a part of its adapter file.
        "head": _open_probe if task.kind == "causal" else _open_ours,
    }
    return opening[contender.kind](contender, config, task)


@dataclass
class _Ours:
    """What ``reft train`` trains, and its file."""

    config: TrainConfig
    task: Task
    model: TrainedModel

    def save(self, fit: FitResult) -> Saved:
        parts = self.task.under(self.config).parts(self.model)
        check_finite(parts.edits, parts.prefix, parts.head)
        metrics = {"valid_loss": fit.best.valid_loss, "base_valid_loss": fit.epochs[0].valid_loss}
        spec = build_spec(
            self.config,
            self.task.loaded.description,
            self.task.datasets,
            fit,
            metrics,
            "reft compare",
            parts,
        )
        data = encode_adapter(spec, parts.edits, parts.prefix, parts.head)
        return Saved(len(data), data)


@contextmanager
def _open_ours(_contender: Contender, config: TrainConfig, task: Task) -> Iterator[Learner]:
    yield _Ours(config, task, task.under(config).new_model())


@dataclass
class _Peft:
    """A method of PEFT, brought into our file by our own converter."""

    config: TrainConfig
    task: Task
    wrapped: Any
    model: TrainedModel

    def save(self, fit: FitResult) -> Saved:
        with tempfile.TemporaryDirectory() as scratch:
            self.wrapped.save_pretrained(scratch)
            num_bytes = (Path(scratch) / "adapter_model.safetensors").stat().st_size
            if self.task.kind == "seq2seq":
                return Saved(num_bytes, num_by_side=self._num_by_side())
            options = ConvertOptions(
                base=self.task.loaded.description,
                name=self.config.name,
                template=self.config.template or BASE_TEMPLATE,
            )
            file = convert(Path(scratch), "peft", options)
        if self.task.kind == "encoder":
            file = self._with_head(decode_adapter(file))
        return Saved(num_bytes + _head_bytes(self.model), file)

    def _num_by_side(self) -> tuple[int, int]:
        """How much of it is in an encoder-decoder's encoder, and in its decoder."""
        trained = {n: p.numel() for n, p in self.wrapped.named_parameters() if p.requires_grad}
        decoder = sum(count for name, count in trained.items() if ".decoder." in name)
        return sum(trained.values()) - decoder, decoder

    def _with_head(self, adapter: Adapter) -> bytes:
        """The file of the converted adapter with the head that was trained beside it."""
        parts = self.task.under(self.config).parts(self.model)
        described = {"task": parts.task, "head": parts.head_spec, "template": None}
        spec = AdapterSpec.model_validate(adapter.spec.model_dump() | described)
        return encode_adapter(spec, adapter.edits, head=parts.head)


@contextmanager
def _open_peft(contender: Contender, config: TrainConfig, task: Task) -> Iterator[Learner]:
    with tuning.peft_in(contender, config, task) as wrapped:
        tuned = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        # Those of a prefix are keys and values, no tokens with states of their own.
        num_virtual = config.prefix_length if contender.name == "peft_prompt_tuning" else 0
        model = _tuned_model(config, task, wrapped, tuned, num_virtual)
        yield _Peft(config, task, wrapped, model)


@dataclass
class _Full:
    """The base's own parameters, all of them."""

    model: TrainedModel
    num_base_bytes: int

    def save(self, fit: FitResult) -> Saved:
        return Saved(self.num_base_bytes + _head_bytes(self.model))


@contextmanager
def _open_full(_contender: Contender, config: TrainConfig, task: Task) -> Iterator[Learner]:
    base = task.loaded.model
    num_bytes = sum(parameter.nbytes for parameter in base.parameters())
    with tuning.all_of(base) as tuned:
        yield _Full(_tuned_model(config, task, base, tuned), num_bytes)


def _tuned_model(
    config: TrainConfig,
    task: Task,
    wrapped: nn.Module,
    tuned: list[nn.Parameter],
    num_virtual: int = 0,
) -> TrainedModel:
    """The base, ``wrapped`` or not, with the parameters that are ``tuned``, and an encoder's head
    beside them."""
    if task.kind == "causal":
        return BaselineModel(task.loaded.model, wrapped, tuned, num_virtual)
    tunable: Any = task.under(config)
    model: TrainedModel = tunable.new_model(tuned)
    return model


def _head_bytes(model: Any) -> int:
    """Of the file of an encoder's trained head; 0 where there is none."""
    if not hasattr(model, "head"):
        return 0
    return len(save({name: t.contiguous() for name, t in model.head.to_head().tensors().items()}))


@dataclass
class _Probe:
    """A linear map of the frozen base's last hidden state."""

    model: ProbeModel

    def save(self, fit: FitResult) -> Saved:
        tensors = {name: t.contiguous() for name, t in self.model.head.state_dict().items()}
        return Saved(len(save(tensors)))


@contextmanager
def _open_probe(_contender: Contender, config: TrainConfig, task: Task) -> Iterator[Learner]:
    set_seed(config.seed)
    yield _Probe(ProbeModel(task.loaded.model, task.label_completions, task.features))
