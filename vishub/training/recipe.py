"""What a task must say so that the one training loop can train it."""
import abc
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional, Sequence, Tuple

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from vishub.training.config import TrainConfig
    from vishub.training.loop import TrainResult

__all__ = ['Recipe', 'SampleKey']

# (epoch, index of the sample, image side in pixels): all that a training sample may depend on, besides the seed.
SampleKey = Tuple[int, int, int]


class Recipe(abc.ABC):
    """A task's model, data, loss and metric. `vishub.training.train(recipe, config)` does the rest.

    Attributes:
        metric: The key of `validate`'s result by which runs are judged; higher is better.
    """

    metric: str = 'top1'

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """The model to train, freshly initialised (the loop seeds torch before it calls this)."""

    @abc.abstractmethod
    def train_set(self) -> Dataset:
        """Samples by `SampleKey`.

        A sample must be a pure function of its key, so that neither the number of loader processes nor a resume
        changes what the model sees.
        """

    @abc.abstractmethod
    def prepare(self, batch: Any, side: int, training: bool) -> Tuple[Any, Any]:
        """Turn a collated batch, already on the device, into (model input, targets of the loss).

        The model input is a tensor, or a tuple of the arguments of a model that takes several.
        Work that is cheaper on a batch than on a sample belongs here: resizing, normalising, mixing. Randomness may
        come from torch's, numpy's and Python's global generators: the loop seeds them at every step.
        """

    @abc.abstractmethod
    def loss(self, output: Any, targets: Any) -> torch.Tensor:
        """Mean loss of a batch, a scalar."""

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return True

    def train_mode(self, model: nn.Module) -> None:
        """Called at every step with the model in training mode: a recipe may put frozen parts into eval mode."""
        return

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once, before a checkpoint is read: a recipe that goes on from another run loads its state here."""
        return

    def remarks(self) -> Sequence[str]:
        """Lines that a user should read before training, known once the model is built."""
        return ()

    def preview(self, side: int) -> Optional[Image.Image]:
        """A picture of augmented training samples as the model gets them; None where there is none."""
        return None

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        """Metrics on the validation split; None where there is none. `model` is in eval mode, gradients are off.

        Every process calls this. `vishub.training.processes` shares the work out (`my_share`) and brings the results
        together (`gather_shares`); a recipe that does neither measures everything on every process.
        """
        return None

    def describe(self) -> Dict[str, Any]:
        """Options of the recipe that decide the weights, as JSON types; a checkpoint resumes only under the same."""
        return {}

    def finish(self, model: nn.Module, result: 'TrainResult', config: 'TrainConfig') -> Optional[Path]:
        """Called once, on the main process, with the final weights: evaluate and store them."""
        return None
