"""What one training run is told: typed settings, read from YAML, flags, or both."""

from trainer.config.train import TrainConfig

__all__ = ["TrainConfig"]
