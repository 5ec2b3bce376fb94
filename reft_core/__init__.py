"""The edit algebra, the adapter format and the engine. Torch only; knows nothing of HTTP."""

__version__ = "0.1.0"
