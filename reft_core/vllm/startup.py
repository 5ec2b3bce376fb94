"""Whether all of vLLM is armed: its front ends, engine cores and workers check each other.

They may run on different machines, with different packages. Armed by half, requests would be
answered by the base model, or from KV blocks that other edits have changed.
"""

from __future__ import annotations

import hashlib
from functools import wraps
from typing import Any

from reft_core import __version__
from reft_core.errors import UnsupportedFeature
from reft_core.vllm.apply import OPERATOR
from reft_core.vllm.request import KEY
from reft_core.vllm.settings import Settings

_SUFFIX = f"+reft{__version__}"
"""What an armed engine core adds to the version it tells its front ends."""


def checking_workers(init: Any) -> Any:
    """``EngineCore.__init__`` that raises unless every worker has armed layers."""

    @wraps(init)
    def initialise(core: Any, *args: Any, **kwargs: Any) -> None:
        init(core, *args, **kwargs)
        try:
            statuses = core.collective_rpc("reft_status")
        except Exception as error:
            raise UnsupportedFeature(
                "vllm: the reft plugin is not armed in every worker; is reft-serve installed on "
                f"every node, and does VLLM_PLUGINS name reft if it is set? ({error})"
            ) from None
        if not all(status["num_sites"] > 0 for status in statuses):
            raise UnsupportedFeature(f"vllm: a worker has armed no layer: {statuses}")

    return initialise


def saying_so(make_ready_response: Any) -> Any:
    """``EngineCoreProc._make_ready_response`` that says that the core is armed."""

    @wraps(make_ready_response)
    def make(core: Any) -> Any:
        response = make_ready_response(core)
        response.vllm_version += _SUFFIX
        return response

    return make


def checking_core(apply_ready_response: Any) -> Any:
    """``MPClient._apply_ready_response`` that raises unless the core said so."""

    @wraps(apply_ready_response)
    def apply(client: Any, payload: bytes) -> None:
        # The payload is msgpack, in which a string's bytes stand as they are.
        if payload and _SUFFIX.encode() not in bytes(payload):
            raise UnsupportedFeature(
                f"vllm: an engine core is not armed with reft-serve {__version__}, as this front "
                "end is; install it on every node"
            )
        apply_ready_response(client, payload)

    return apply


def refusing_unadmitted(preprocess: Any) -> Any:
    """``EngineCore.preprocess_add_request`` that raises for adapters that no front end admitted.

    vLLM ends such a request in error. A front end that is not armed would send them, and so would
    a caller that passes its input processor by.
    """

    @wraps(preprocess)
    def add(core: Any, request: Any) -> Any:
        params = request.sampling_params
        if params is not None and KEY in (params.extra_args or {}):
            raise UnsupportedFeature(
                f"extra_args.{KEY}: the front end has not admitted the adapters; is reft-serve "
                "installed there, and does VLLM_PLUGINS name reft if it is set?"
            )
        return preprocess(core, request)

    return add


def with_salt(compute_hash: Any) -> Any:
    """``VllmConfig.compute_hash``, unlike that of a vLLM whose layers have no hooks."""

    @wraps(compute_hash)
    def hash_with_plugin(config: Any, *args: Any, **kwargs: Any) -> str:
        sites = ",".join(sorted(Settings.of(config).sites))
        salt = hashlib.sha256(f"reft {sites}".encode()).hexdigest()[:8]
        return f"{compute_hash(config, *args, **kwargs)}{salt}"

    return hash_with_plugin


def splitting_at_edits(set_splitting_ops: Any) -> Any:
    """``CompilationConfig.set_splitting_ops_for_v1`` that splits graphs at our operator too."""

    @wraps(set_splitting_ops)
    def set_ops(config: Any, *args: Any, **kwargs: Any) -> None:
        set_splitting_ops(config, *args, **kwargs)
        if config.splitting_ops and OPERATOR not in config.splitting_ops:
            config.splitting_ops.append(OPERATOR)

    return set_ops
