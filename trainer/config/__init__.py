"""What one training run is told: typed settings, read from YAML, flags, or both."""

from trainer.config.base import PATH_FIELDS, SOURCE_FIELDS
from trainer.config.train import TrainConfig

__all__ = ["PATH_FIELDS", "SOURCE_FIELDS", "TrainConfig"]
