"""What the plugin adds to every vLLM worker, callable by ``collective_rpc`` under these names.

The plugin arms them on ``WorkerBase`` itself; ``--worker-extension-cls`` is not needed.
"""

from __future__ import annotations


class ReftWorker:
    """Methods that :class:`vllm.v1.worker.worker_base.WorkerBase` gets from the plugin."""

    def reft_load(self, file: bytes) -> str:
        """Hold an adapter from now on, given its file; returns its digest. Idempotent.

        Raises :class:`AdapterFileInvalid` or :class:`AdapterMismatch`.
        """
        raise NotImplementedError

    def reft_unload(self, digest: str) -> None:
        """Hold an adapter no longer; no-op if it is not held. Requests that run keep it."""
        raise NotImplementedError

    def reft_list(self) -> list[str]:
        """Digests of the adapters held."""
        raise NotImplementedError
