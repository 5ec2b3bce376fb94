"""transformers' Trainer as it serves here: its losses, its order of rows, its checkpoints."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments
from typing_extensions import override

from reft_core.errors import TrainingError, explain
from trainer.batches import batches
from trainer.checkpoints import read_checkpoint, write_checkpoint
from trainer.collate import IGNORED
from trainer.config import TrainConfig
from trainer.outcome import diverged
from trainer.processes import device, summed, world
from trainer.task import TrainedModel
from trainer.trackers import tracker_callbacks
from trainer.validation import Saving, Validation


class ReftTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """A Trainer of interventions on rows that are in their order already.

    A step's loss is the mean over the completion tokens of all its rows, in however many parts
    and processes they are computed, and must be finite.
    """

    def __init__(
        self,
        model: TrainedModel,
        rows: Sequence[Any],
        config: TrainConfig,
        collator: Callable[[Sequence[Any]], Any],
        validation: Validation,
        *,
        scratch: str,
        run: Mapping[str, Any],
        on_loss: Callable[[float], None],
    ) -> None:
        self._config = config
        self._rows = rows
        self._collator = collator
        self._validation = validation
        self._on_loss = on_loss
        self._run = dict(run)
        self._step_loss = 0.0
        self._resumed: dict[str, Any] = {}
        self.step_seconds = 0.0
        self.step_cpu_seconds = 0.0
        optimizer = torch.optim.AdamW(
            # Weight decay cannot harm a basis (see orthonormalise).
            model.parameter_groups(config.learning_rate),
            weight_decay=config.weight_decay,
        )
        super().__init__(
            model=model,
            args=_arguments(config, len(rows), scratch),
            data_collator=collator,
            train_dataset=rows,
            callbacks=[validation, Saving(config), *tracker_callbacks(config)],
            optimizers=(optimizer, None),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # makes it count the tokens of a step's parts
        validation.log = self.log
        validation.revisit = self.revisit
        if config.autocast:
            for intervention in model.interventions:
                intervention.forward = _in_float32(intervention.forward)

    def run(self, checkpoint: Path | None) -> None:
        """Train, from the start or from ``checkpoint``."""
        if checkpoint is not None:
            self._resumed = read_checkpoint(checkpoint)
            self._validation.restore(self._resumed["validation"])
            self.step_seconds = self._resumed["step_seconds"]
            self.step_cpu_seconds = self._resumed["step_cpu_seconds"]
        self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    @torch.no_grad()
    def revisit(self, steps: int) -> None:
        """Compute again what the first of ``steps`` steps left in memory, in the same batches.

        How a row's keys and values are rounded depends on the rows beside it, so that going on
        with others would not give the same adapter.
        """
        if self._config.prefix_cache_mb == 0:
            return
        process, num_processes = world()
        size = self.args.per_device_train_batch_size
        steps = min(steps, math.ceil(self._validation.num_rows / self._config.batch_size))
        for part in range(steps * self._config.accumulate):
            start = (part * num_processes + process) * size
            own = self._rows[start : start + size]
            for batch in batches(own, size, self._collator, self.args.device):
                self.model(**batch)

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self._rows)

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The parts of one step in this process, and the loss-carrying cells in all of them."""
        parts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(int((part["labels"] != IGNORED).sum()) for part in parts)
        return parts, torch.tensor(summed([count])[0], device=device)

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(**inputs)
        # Gradients are added over parts and averaged over processes.
        own = (inputs["labels"] != IGNORED).sum() * self.accelerator.num_processes
        loss = outputs["loss"] * (own / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @override
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        start, cpu_start = time.perf_counter(), time.process_time()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        self.step_seconds += time.perf_counter() - start
        self.step_cpu_seconds += time.process_time() - cpu_start
        if not math.isfinite(value):
            raise diverged(f"the loss became {value} at step {self.state.global_step + 1}")
        self._step_loss += value
        if self.accelerator.sync_gradients:
            self._validation.note(self._step_loss)
            self._on_loss(self._step_loss)
            self._step_loss = 0.0
        return loss

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.args.should_save:
            return
        write_checkpoint(
            self._config.checkpoint_dir,
            self.state.global_step,
            json.dumps(asdict(self.state)),
            {
                "run": self._run,
                "model": self.model.trained_state(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "validation": self._validation.state(),
                "step_seconds": self.step_seconds,
                "step_cpu_seconds": self.step_cpu_seconds,
                "random": torch.get_rng_state(),
            },
        )

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_trained_state(self._resumed["model"])

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(self._resumed["optimizer"])
            self.lr_scheduler.load_state_dict(self._resumed["scheduler"])

    @override
    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            torch.set_rng_state(self._resumed["random"])

    @override
    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: bfloat16 needs no scaling of the loss."""


def _arguments(config: TrainConfig, num_visits: int, scratch: str) -> TrainingArguments:
    parts = config.accumulate * world()[1]
    if config.batch_size % parts:
        raise TrainingError(
            explain(
                "batch_size",
                config.batch_size,
                f"a multiple of {parts}, accumulate times the number of processes",
            ),
            field="batch_size",
        )
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=1,  # of rows that are repeated already
        max_steps=num_visits // config.batch_size,
        per_device_train_batch_size=config.batch_size // parts,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.autocast,
        use_cpu=device().type == "cpu",  # else bf16 is refused there
        save_strategy="no",  # Saving asks for checkpoints
        logging_strategy="no" if config.report_to == "none" else "steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # we stop at such a loss instead of hiding it
        report_to="none",  # trackers are added as callbacks
        run_name=config.name,
        disable_tqdm=True,
        remove_unused_columns=False,  # rows are ours, not columns of a data set
        ddp_find_unused_parameters=False,  # with_unused sees to it that there are none
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        # nn.DataParallel would copy the hooked base; processes (accelerate launch) do not.
        arguments._n_gpu = 1
    return arguments


def _in_float32(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``forward`` outside autocast: an edit is computed as it is served."""

    @functools.wraps(forward)
    def run(hidden: Tensor, *args: Any) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden, *args)

    return run
