"""The entry point ``vllm.general_plugins``: makes vLLM accept reft adapters, in every process.

vLLM calls :func:`register` in its API servers, engine cores and workers. It replaces some of
vLLM's functions by wrappers of them, and starts nothing if it does not find all of them.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from typing import Any

_MARK = "_reft_wrapped"

_RENAMED_KEYS = (
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.core.block_pool",
    "vllm.v1.simple_kv_offload.manager",
)
"""Modules that hold ``generate_block_hash_extra_keys`` under a name of their own."""


def register() -> None:
    """Arm vLLM. Idempotent.

    Raises :class:`UnsupportedFeature` on another release of vLLM than the pinned one, and
    :class:`RuntimeError` if something that is to be wrapped is not there.
    """
    from reft_core.vllm.guard import check_version

    check_version()
    _arm()


def _arm() -> None:
    from reft_core.vllm import admission, keys, names, scheduling, seeds, worker

    _wrap("vllm.v1.engine.input_processor:InputProcessor.__init__", admission.with_catalog)
    _wrap("vllm.v1.engine.input_processor:InputProcessor.process_inputs", admission.with_admission)
    _wrap("vllm.v1.core.sched.scheduler:Scheduler.update_from_output", scheduling.failing_requests)
    _wrap("vllm.v1.engine.core:EngineCore.__init__", with_check_of_workers)
    _wrap("vllm.config.vllm:VllmConfig.compute_hash", with_salt)
    _wrap("vllm.config.compilation:CompilationConfig.set_splitting_ops_for_v1", with_operator)
    for module in _RENAMED_KEYS:
        _wrap(f"{module}:generate_block_hash_extra_keys", keys.with_edits)
    gpu = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
    _wrap(f"{gpu}.load_model", worker.after_load_model)
    _wrap(f"{gpu}._model_forward", worker.with_plan)
    _wrap(f"{gpu}._update_states", worker.forgetting)
    _wrap(f"{gpu}.sample_tokens", worker.naming_failures)
    _wrap(f"{gpu}._sample", seeds.rewinding)
    _wrap(f"{gpu}._bookkeeping_sync", seeds.sparing)
    _wrap(f"{gpu}._determine_batch_execution_and_padding", worker.never_full_graph_of_edits)
    _wrap("vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model", worker.after_load_model)
    base = importlib.import_module("vllm.v1.worker.worker_base").WorkerBase
    for name in ("reft_load", "reft_unload", "reft_list", "reft_status"):
        setattr(base, name, getattr(worker.ReftWorker, name))
    names.arm(_wrap)


def _wrap(target: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace ``module:name`` or ``module:Class.name`` by its wrapper, once."""
    module_name, _, path = target.partition(":")
    holder: Any = importlib.import_module(module_name)
    *owners, name = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner, None)
    found = vars(holder).get(name) if holder is not None else None
    if found is None:
        raise RuntimeError(f"the reft plugin does not find {target} in this vLLM")
    if not hasattr(found, _MARK):
        wrapped = wrapper(found)
        setattr(wrapped, _MARK, True)
        setattr(holder, name, wrapped)


def with_check_of_workers(init: Any) -> Any:
    """``EngineCore.__init__`` that ends unless every worker has armed layers."""

    def initialise(core: Any, *args: Any, **kwargs: Any) -> None:
        init(core, *args, **kwargs)
        statuses = core.collective_rpc("reft_status")
        if not all(status["num_sites"] > 0 for status in statuses):
            raise RuntimeError(f"the reft plugin is not armed in every worker: {statuses}")

    return initialise


def with_salt(compute_hash: Any) -> Any:
    """``VllmConfig.compute_hash``, unlike that of a vLLM whose layers have no hooks."""

    def hash_with_plugin(config: Any, *args: Any, **kwargs: Any) -> str:
        from reft_core.vllm.settings import Settings

        sites = ",".join(sorted(Settings.of(config).sites))
        salt = hashlib.sha256(f"reft {sites}".encode()).hexdigest()[:8]
        return f"{compute_hash(config, *args, **kwargs)}{salt}"

    return hash_with_plugin


def with_operator(set_splitting_ops: Any) -> Any:
    """``CompilationConfig.set_splitting_ops_for_v1`` that splits graphs at our operator too."""

    def set_ops(config: Any, *args: Any, **kwargs: Any) -> None:
        from reft_core.vllm.apply import OPERATOR

        set_splitting_ops(config, *args, **kwargs)
        if config.splitting_ops and OPERATOR not in config.splitting_ops:
            config.splitting_ops.append(OPERATOR)

    return set_ops
