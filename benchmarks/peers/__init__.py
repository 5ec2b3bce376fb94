"""Engines that are compared: each runs in a worker process of its own; see :mod:`protocol`.

Nothing here but ``reft_worker`` imports the project: a peer's environment has other versions of
torch and transformers, or none.
"""
