"""transformers' Trainer as it serves here: its losses, its checkpoints, and when it validates."""

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
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from typing_extensions import override

from reft_core.errors import TrainingError, explain
from trainer.batches import batches
from trainer.checkpoints import read_checkpoint, write_checkpoint
from trainer.collate import IGNORED
from trainer.config import TrainConfig
from trainer.order import steps_between_validations
from trainer.outcome import Epoch, FitResult, diverged
from trainer.processes import summed, world
from trainer.task import Measured, TrainedModel
from trainer.trackers import tracker_callbacks


class Validation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Measures the model on the validation rows now and then, and keeps the best parameters."""

    def __init__(
        self,
        model: TrainedModel,
        config: TrainConfig,
        num_rows: int,
        measure: Callable[[], Measured],
    ) -> None:
        self.log: Callable[[dict[str, float]], None] = lambda logs: None
        self.revisit: Callable[[int], None] = lambda steps: None
        self._model = model
        self._config = config
        self.num_rows = num_rows
        self._measure = measure
        self._epochs: list[Epoch] = []
        self._best: Epoch | None = None
        self._best_rank = (-math.inf, -math.inf)
        self._best_parameters: list[dict[str, Tensor]] = []
        self._losses: list[float] = []
        """Of this process's steps since the last validation."""

    def note(self, loss: float) -> None:
        """Take this process's share of a step's loss."""
        self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this."""
        return {
            "epochs": [vars(epoch) for epoch in self._epochs],
            "best": None if self._best is None else vars(self._best),
            "best_parameters": self._best_parameters,
            "best_rank": self._best_rank,
            "losses": self._losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self._epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self._best = None if state["best"] is None else Epoch(**state["best"])
        self._best_parameters = state["best_parameters"]
        self._best_rank = tuple(state["best_rank"])
        self._losses = state["losses"]

    def finish(self, steps: int, seconds: float) -> FitResult:
        """Give the model its best parameters back, and say how it went."""
        assert self._best is not None
        self._model.load_trained_state(self._best_parameters)
        return FitResult(tuple(self._epochs), self._best, steps, seconds)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            return
        # Also when going on from a checkpoint: what is kept of it counts among what steps use.
        found = self._measure()
        if self._epochs:
            self.revisit(state.global_step)
        else:
            self._note(Epoch(0, None, found.loss, valid_metrics=dict(found.metrics)))

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        state.epoch = step * self._config.batch_size / self.num_rows
        every = steps_between_validations(self._config, self.num_rows)
        if step % every and step != state.max_steps:
            return
        count = len(self._losses) * world()[1]
        train_loss = summed([sum(self._losses)])[0] / count
        found = self._measure()
        metrics = dict(found.metrics)
        epoch = Epoch(len(self._epochs), train_loss, found.loss, step, metrics)
        if not math.isfinite(epoch.valid_loss):
            raise diverged(f"the validation loss became {epoch.valid_loss}")
        self._losses = []
        self._note(epoch)
        if self._best is None or found.rank > self._best_rank:
            self._best, self._best_rank = epoch, found.rank
            self._best_parameters = self._model.trained_state()
        patience = self._config.patience
        if patience is not None and epoch.number - self._best.number >= patience:
            control.should_training_stop = True

    def _note(self, epoch: Epoch) -> None:
        """Keep what was measured, and tell the trackers."""
        self._epochs.append(epoch)
        metrics = {f"eval_{name}": value for name, value in epoch.valid_metrics.items()}
        self.log({"eval_loss": epoch.valid_loss, **metrics})


class _Saving(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Says when a checkpoint is due."""

    def __init__(self, config: TrainConfig) -> None:
        self._steps = config.checkpoint_steps
        self._seconds = config.checkpoint_seconds
        self._last = time.monotonic()

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            due = state.global_step % self._steps == 0
        else:
            due = time.monotonic() - self._last >= self._seconds
        if due:
            control.should_save = True
            self._last = time.monotonic()


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
            callbacks=[validation, _Saving(config), *tracker_callbacks(config)],
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
        start = time.perf_counter()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        self.step_seconds += time.perf_counter() - start
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
        save_strategy="no",  # _Saving asks for checkpoints
        logging_strategy="no" if config.report_to == "none" else "steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # we stop at such a loss instead of hiding it
        report_to="none",  # trackers are added as callbacks
        run_name=config.name,
        disable_tqdm=True,
        remove_unused_columns=False,  # rows are ours, not columns of a data set
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
