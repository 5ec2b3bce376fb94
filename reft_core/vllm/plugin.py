"""The entry point ``vllm.general_plugins``: makes vLLM accept reft adapters, in every process.

vLLM calls :func:`register` in its API servers, engine cores and workers. It replaces some of
vLLM's functions by wrappers of them, and starts nothing if it does not find all of them.
"""

from __future__ import annotations

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
    from reft_core.vllm import (
        admission,
        keys,
        names,
        runner,
        runner_v2,
        scheduling,
        seeds,
        startup,
        worker,
    )

    core, config = "vllm.v1.engine.core", "vllm.config"
    inputs = "vllm.v1.engine.input_processor:InputProcessor"
    first = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
    second = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
    cpu = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
    client = "vllm.v1.engine.core_client:MPClient"
    serving = "vllm.entrypoints.serve.engine.serving:BaseServing"
    models = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
    wrappers = {
        f"{inputs}.__init__": admission.with_catalog,
        f"{inputs}.process_inputs": admission.with_admission,
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": scheduling.failing_requests,
        f"{core}:EngineCore.__init__": startup.checking_workers,
        f"{core}:EngineCore.preprocess_add_request": startup.refusing_unadmitted,
        f"{core}:EngineCoreProc._make_ready_response": startup.saying_so,
        f"{client}._apply_ready_response": startup.checking_core,
        f"{config}.vllm:VllmConfig.compute_hash": startup.with_salt,
        f"{config}.compilation:CompilationConfig.set_splitting_ops_for_v1": (
            startup.splitting_at_edits
        ),
        f"{cpu}.load_model": worker.after_load_model,
        f"{first}.load_model": worker.after_load_model,
        f"{first}._model_forward": runner.with_plan,
        f"{first}._update_states": runner.forgetting,
        f"{first}.sample_tokens": runner.naming_failures,
        f"{first}._sample": seeds.rewinding,
        f"{first}._bookkeeping_sync": seeds.sparing,
        f"{first}._determine_batch_execution_and_padding": runner.never_full_graph_of_edits,
        # Refused by the guard unless it is told otherwise.
        f"{second}.load_model": worker.after_load_model,
        f"{second}.add_requests": runner_v2.noting_requests,
        f"{second}.finish_requests": runner_v2.forgetting,
        f"{second}.gather_batch_req_state": runner_v2.beginning_a_step,
        f"{second}.execute_model": runner_v2.ending_the_step,
        f"{second}.sample_tokens": runner.naming_failures,
        **{f"{module}:generate_block_hash_extra_keys": keys.with_edits for module in _RENAMED_KEYS},
        f"{serving}._check_model": names.with_adapters,
        f"{serving}._is_model_supported": names.supporting_adapters,
        f"{models}.show_available_models": names.listing_adapters,
    }
    for target, wrapper in wrappers.items():
        _wrap(target, wrapper)
    base = importlib.import_module("vllm.v1.worker.worker_base").WorkerBase
    for name in ("reft_load", "reft_unload", "reft_list", "reft_status"):
        setattr(base, name, getattr(worker.ReftWorker, name))


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
