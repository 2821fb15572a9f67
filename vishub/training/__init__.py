"""One training loop for every task: `train(recipe, config)`."""
from vishub.training.config import TrainConfig, parse_resolution
from vishub.training.loop import TrainResult, train
from vishub.training.recipe import Recipe, SampleKey

__all__ = ['Recipe', 'SampleKey', 'TrainConfig', 'TrainResult', 'parse_resolution', 'train']
