"""What a training step costs here, in pyreft and in PEFT; ``python -m benchmarks.training``."""
