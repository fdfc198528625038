"""Training: `train(model, task, spec)`, its spec and its result, and the step that it repeats."""

from contextlab.training.spec import CurriculumSpec, TrainSpec
from contextlab.training.trainer import TrainResult, TrainState, train, train_step

__all__ = ["CurriculumSpec", "TrainResult", "TrainSpec", "TrainState", "train", "train_step"]
