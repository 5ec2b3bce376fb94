"""Imported once by the process that servers are forked from: what takes seconds to import."""

from __future__ import annotations

import torch

import reft_core.engine.engine
import server.app

__all__ = ["reft_core", "server", "torch"]
torch.set_num_threads(1)
