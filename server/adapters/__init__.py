"""Adapters at run time: which are in the engine, which stay, and what follows the registry."""
