"""What the plugin adds to vLLM's workers: an armed model, a store of adapters, and how to fill it.

Workers answer to ``reft_load``, ``reft_unload``, ``reft_list`` and ``reft_status`` by
``collective_rpc``. None of them raises for what a caller sent: an exception of one rank would leave
the answers of the others behind, to be taken for those to the next call. So an answer that begins
with :data:`REFUSED` says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import check_fits
from reft_core.errors import AdapterError, UnsupportedModel
from reft_core.vllm.apply import Step, arm_site, begin_step, end_step
from reft_core.vllm.catalog import describe_base
from reft_core.vllm.files import AdapterFiles
from reft_core.vllm.guard import check_config, check_reduced
from reft_core.vllm.layers import find_site, local_layers
from reft_core.vllm.plan import Chunk, Planner
from reft_core.vllm.settings import Settings
from reft_core.vllm.store import WorkerStore

REFUSED = "refused: "
_STATE = "_reft"
_TAG = 0x7EF7
"""Of our messages between pipeline stages, among vLLM's own."""

log = logging.getLogger(__name__)


class Armed:
    """The plugin's part of one model runner."""

    def __init__(self, runner: Any) -> None:
        config = runner.vllm_config
        settings = Settings.of(config)
        check_config(config, settings)
        text_config = config.model_config.hf_text_config
        layers = local_layers(runner.model, text_config.num_hidden_layers)
        for number, layer in layers.items():
            for site in settings.sites:
                found = find_site(runner.model, layer, site)
                check_reduced(site, runner.model, found.module)
                arm_site(found, number, site)
        if not layers:
            raise UnsupportedModel(f"{type(runner.model).__name__}: no layer could be armed")
        base = describe_base(config)
        self.sites = {(layer, site) for layer in layers for site in settings.sites}
        self.store = WorkerStore(
            AdapterFiles(settings.spool, settings.spool_bytes, settings.adapters),
            settings.resident_bytes,
            set(layers),
            runner.device,
            lambda adapter: check_fits(adapter.spec, base),
        )
        self.planner = Planner(self.store, runner.device)
        self.failed: set[str] = set()
        """Requests of the running step that must not go on."""
        self._sent: Any = None
        """The last flags sent to the next pipeline stage, whose memory must live until then."""
        self.requests: dict[str, tuple[Any, int]] = {}
        """Sampling parameters and prompt length of requests with adapters, for runners that do
        not keep them."""
        log.info("reft: armed %d layers at %s", len(layers), ", ".join(settings.sites))

    def begin(self, chunks: Sequence[Chunk]) -> Step:
        """Have the layers apply what these chunks of a step ask for."""
        plan, failed = self.planner.plan(chunks)
        self.failed.update(_failed_anywhere(chunks, failed))
        return begin_step(plan)

    def end(self, chunks: Sequence[Chunk], step: Step) -> None:
        """Have them apply nothing, and note whose edits came to no number."""
        end_step()
        if overflowed := step.overflowed_rows():
            self.failed.update(
                chunk.request_id
                for chunk in chunks
                if not overflowed.isdisjoint(range(chunk.row, chunk.row + chunk.length))
            )
        self._pass_on(chunks)

    def _pass_on(self, chunks: Sequence[Chunk]) -> None:
        """Tell the next pipeline stage what failed up to here; the scheduler hears the last one.

        All stages have the same chunks in a step.
        """
        from vllm.distributed.parallel_state import get_pp_group

        stages = get_pp_group()
        if stages.world_size == 1:
            return
        flags = _flags(chunks, self.failed)
        if not stages.is_first_rank:
            before = torch.empty_like(flags)
            torch.distributed.recv(before, stages.prev_rank, stages.cpu_group, _TAG)
            flags |= before
        self.failed = set(_flagged(chunks, flags))
        if not stages.is_last_rank:
            if self._sent is not None:
                self._sent.wait()
            # It arrives when the next stage has run this step, which waits for this one's states.
            self._sent = torch.distributed.isend(flags, stages.next_rank, stages.cpu_group, _TAG)
            self.failed.clear()

    def name_failures(self, output: Any) -> None:
        """Have a step's output tell the scheduler which requests must fail."""
        if not self.failed:
            return
        failed = sorted(self.failed)
        self.failed.clear()
        log.error("reft: failing requests %s", failed)
        if hasattr(output, "get_output"):  # it is still on its way from the device
            output.get_output = _naming(output.get_output, failed)
        else:
            output.reft_failed = failed


def _naming(get_output: Callable[[], Any], failed: list[str]) -> Callable[[], Any]:
    """The ``get_output`` of an output to come, which names what failed."""

    def get() -> Any:
        output = get_output()
        output.reft_failed = failed
        return output

    return get


def _failed_anywhere(chunks: Sequence[Chunk], failed: Sequence[str]) -> list[str]:
    """Requests of a step that this rank, or another one with the same layers, cannot edit.

    All tensor-parallel ranks call it in the same step.
    """
    from vllm.distributed.parallel_state import get_tp_group

    ranks = get_tp_group()
    if ranks.world_size == 1:
        return list(failed)
    flags = _flags(chunks, failed)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, ranks.cpu_group)
    return _flagged(chunks, flags)


def _flags(chunks: Sequence[Chunk], failed: Collection[str]) -> Tensor:
    """Which chunks are of requests that failed, (num_chunks,) int32."""
    return torch.tensor([chunk.request_id in failed for chunk in chunks], dtype=torch.int32)


def _flagged(chunks: Sequence[Chunk], flags: Tensor) -> list[str]:
    return [chunk.request_id for chunk, flag in zip(chunks, flags.tolist(), strict=True) if flag]


def armed(runner: Any) -> Armed:
    """The plugin's part of a runner that has loaded its model."""
    found: Armed = getattr(runner, _STATE)
    return found


def after_load_model(load_model: Any) -> Any:
    """A runner's ``load_model`` that arms the model it has loaded."""

    @wraps(load_model)
    def load(runner: Any, *args: Any, **kwargs: Any) -> None:
        load_model(runner, *args, **kwargs)
        if not hasattr(runner, _STATE):
            setattr(runner, _STATE, Armed(runner))

    return load


class ReftWorker:
    """Methods that vLLM's ``WorkerBase`` gets from the plugin."""

    model_runner: Any

    def reft_load(self, file: bytes, digest: str) -> str:
        """Hold the adapter of this file and digest from now on; answers the digest. Idempotent."""
        try:
            armed(self.model_runner).store.load(bytes(file), digest)
        except Exception as error:
            return f"{REFUSED}{error}"
        return digest

    def reft_unload(self, digest: str) -> None:
        """Hold an adapter no longer; no-op if it is not held. Requests that run keep it."""
        armed(self.model_runner).store.unload(digest)

    def reft_list(self) -> list[str]:
        """Digests of the adapters held."""
        return armed(self.model_runner).store.held()

    def reft_status(self) -> dict[str, int]:
        """How many sites of this rank are armed, and how many bytes of adapters it has."""
        ours = armed(self.model_runner)
        return {"num_sites": len(ours.sites), "resident_bytes": ours.store.resident_bytes}


def check_loaded(answers: Sequence[str], digest: str) -> None:
    """Raise :class:`AdapterError` unless all workers answered ``reft_load`` with this digest, with
    what one of them said instead."""
    for answer in answers:
        if answer != digest:
            raise AdapterError(f"a worker {answer}")
