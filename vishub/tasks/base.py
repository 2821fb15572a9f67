"""What every task's pipeline and result have in common, and `vishub.pipeline`, which finds the right one.

A task is a folder with four files: `pipeline.py` (what a user calls), `data.py`, `training.py` (a `Recipe`) and
`metrics.py`. CONTRIBUTING.md says how to add one.
"""
import abc
import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Dict, List, Optional, Sequence, Tuple, TypeVar, Union

import timm
import torch
from PIL import Image
from timm.models import load_model_config_from_hf
from torch import nn

from vishub import catalog
from vishub.errors import InputError
from vishub.files import atomic_path

if TYPE_CHECKING:
    from vishub.training.recipe import Recipe

__all__ = [
    'Pipeline', 'Progress', 'Recipe', 'Result',
    'choose_device', 'pipeline', 'pipeline_class', 'pipeline_tasks', 'pretrained_cfg_of', 'task_of',
]

# (inputs done, inputs in all). An exception that it raises stops the work: that is how long work is cancelled.
Progress = Callable[[int, int], None]

Input = TypeVar('Input')
Output = TypeVar('Output')

# task -> (module, class), imported when first asked for. A task joins by one line here.
_PIPELINES: Dict[str, Tuple[str, str]] = {
    'classification': ('vishub.tasks.classification.pipeline', 'ClassificationPipeline'),
    'deblurring': ('vishub.tasks.deblurring.pipeline', 'DeblurringPipeline'),
    'generation': ('vishub.tasks.generation.pipeline', 'GenerationPipeline'),
    'tracking': ('vishub.tasks.tracking.pipeline', 'TrackingPipeline'),
    'slide_analysis': ('vishub.tasks.slide_analysis.pipeline', 'SlideAnalysisPipeline'),
    'video_prediction': ('vishub.tasks.video_prediction.pipeline', 'VideoPredictionPipeline'),
    'video_segmentation': ('vishub.tasks.video_segmentation.pipeline', 'VideoSegmentationPipeline'),
    'volume_segmentation': ('vishub.tasks.volume_segmentation.pipeline', 'VolumeSegmentationPipeline'),
}


def __getattr__(name: str) -> Any:
    # Recipes belong to training, which running a model does not need.
    if name == 'Recipe':
        from vishub.training.recipe import Recipe
        return Recipe
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


class Result(abc.ABC):
    """What a pipeline returns: a frozen dataclass that can be printed, drawn and saved without the model.

    Attributes:
        suffixes: The files that `vishub predict --output FOLDER` writes of it, by how their names end.
        warnings: What was left out or could not be done, one sentence each.
    """

    suffixes: ClassVar[Tuple[str, ...]] = ('.png', '.json')
    warnings: Tuple[str, ...] = ()

    @abc.abstractmethod
    def to_dict(self) -> Dict[str, Any]:
        """The result as numbers, strings, lists and dicts, ready for `json.dumps`."""

    @abc.abstractmethod
    def plot(self) -> Image.Image:
        """The result drawn as an RGB picture."""

    def summary(self) -> Sequence[str]:
        """The result in a few lines of text, as `vishub predict` prints it."""
        return [
            f'{name}: {value}' for name, value in self.to_dict().items() if isinstance(value, (str, int, float))]

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """Write the result whole or not at all.

        Args:
            path: `.json` for `to_dict()`; `.png`, `.jpg` or `.webp` for `plot()`. The folder is made if need be.

        Returns:
            The path written.

        Raises:
            InputError: If the path ends otherwise.
            OSError: If the folder cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in ('.json', '.png', '.jpg', '.jpeg', '.webp'):
            raise InputError(f"cannot save a result as '{path}': give a name that ends in .json, .png, .jpg or .webp")
        with atomic_path(path) as temporary:
            if suffix == '.json':
                temporary.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
            else:
                self.plot().save(temporary)
        return path


class Pipeline(abc.ABC):
    """A model with all that lies between a user's file and a result.

    Calling one never changes it, so several threads may share it.

    Args:
        model: One of

            * name of a model with weights: `favit_b2.cifar10`, `vishub/favit_b2.cifar10`, any name of timm,
              `hf-hub:owner/name`, or `local-dir:folder`;
            * a module, which is used as it is (moved to `device` and set to evaluation);
            * None for `default_model`.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or None for the best one here.

    Raises:
        InputError: If the device is not there, or the model cannot serve the task.
        vishub.WeightsNotFoundError: If the name has no weights.

    Attributes:
        task: Name of the task.
        default_model: Name of the model taken when none is given.
        takes_pictures: Whether an input is a picture file, so that on the command line a folder stands for the
            pictures in it; otherwise every word of the command line is given to the pipeline as it is.
        model: The module, in evaluation mode, on `device`.
        name: Name of the model, for results.
        num_params: Number of its parameters.
    """

    task: ClassVar[str]
    default_model: ClassVar[str]
    takes_pictures: ClassVar[bool] = True

    def __init__(
            self,
            model: Union[str, nn.Module, None] = None,
            device: Union[str, torch.device, None] = None,
    ):
        self.device = choose_device(device)
        model = self.default_model if model is None else model
        if isinstance(model, str):
            self.name = model.removeprefix('vishub/')
            module = self.load(model)
        elif isinstance(model, nn.Module):
            self.name = _name_of(model)
            module = model
        else:
            raise InputError(f'cannot use a {type(model).__name__} as a model: give a name or a torch.nn.Module')
        self.model = module.to(self.device).eval()
        self.num_params = sum(parameter.numel() for parameter in self.model.parameters())

    @classmethod
    def load(cls, name: str) -> nn.Module:
        """Build the model of that name with its weights; tasks whose models are not timm's own kind override this."""
        import vishub
        if name.startswith('local-dir:'):
            folder = Path(name.removeprefix('local-dir:'))
            if not (folder / 'config.json').is_file():
                raise InputError(f"'{folder}' holds no config.json: give local-dir: and the folder of saved weights")
        if name.startswith('hf-hub:'):
            from vishub.hub.client import one_sentence, split_hub_id
            split_hub_id(name)
            with one_sentence(name):
                return vishub.create_model(name, pretrained=True)
        if ':' not in name and not name.startswith('vishub/') and timm.is_model(name):
            # Ours too, through the same resolver; but create_model of vishub knows no names of timm's own.
            return timm.create_model(name, pretrained=True)
        return vishub.create_model(name, pretrained=True)  # an unknown name is answered with the nearest ones

    @abc.abstractmethod
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run on one input, giving one result, or on a list of inputs, giving a list of results."""

    def preparer(self) -> Callable[[str], Tuple[torch.Tensor, Any]]:
        """A function that can be pickled: path -> the model's input, and what a row says of the file besides.

        It runs in other processes, which have no model.

        Raises:
            InputError: If this task writes no tables.
        """
        raise self._no_tables()

    def rows(self, batch: torch.Tensor, facts: Sequence[Any], **options: Any) -> List[Dict[str, Any]]:
        """Run the model on what `preparer()` made, stacked: one row of a table for each file.

        Raises:
            InputError: If this task writes no tables.
        """
        raise self._no_tables()

    def _no_tables(self) -> InputError:
        return InputError(f"the task '{self.task}' writes no tables: give a folder as output")

    @staticmethod
    def run_batches(
            inputs: Sequence[Input],
            run: Callable[[List[Input]], List[Output]],
            batch_size: int,
            progress: Optional[Progress] = None,
    ) -> List[Output]:
        """Run a list in batches and tell how far it is: `progress(0, all)` first, then after every batch.

        Raises:
            InputError: If `batch_size` is not positive, or from `run`.
        """
        if batch_size < 1:
            raise InputError(f'batch_size is {batch_size}: give 1 or more')
        outputs: List[Output] = []
        if progress is not None:
            progress(0, len(inputs))
        for start in range(0, len(inputs), batch_size):
            outputs += run(list(inputs[start:start + batch_size]))
            if progress is not None:
                progress(len(outputs), len(inputs))
        return outputs

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model='{self.name}', device='{self.device}')"


def choose_device(device: Union[str, torch.device, None] = None) -> torch.device:
    """The device asked for, or the best one here: CUDA, then Apple's MPS, then the CPU.

    Raises:
        InputError: If it is no device, or not on this machine.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device is None:
        return torch.device('cuda' if has_cuda else 'mps' if has_mps else 'cpu')
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"'{device}' is not a device: give cpu, cuda, cuda:1 or mps") from error
    present = {'cpu': True, 'cuda': has_cuda, 'mps': has_mps, 'meta': False}.get(chosen.type, True)
    if present and chosen.type == 'cuda' and chosen.index is not None:
        present = chosen.index < torch.cuda.device_count()
    if not present:
        raise InputError(f"device '{chosen}' is not on this machine: leave it out to take the best one there is")
    return chosen


def pipeline(
        task: Optional[str] = None,
        model: Union[str, nn.Module, None] = None,
        device: Union[str, torch.device, None] = None,
) -> Pipeline:
    """Make the pipeline of a task, or the one that a model is for.

    Args:
        task: Task name, e.g. `classification`. May be left out if `model` is given: the catalogue knows the task of
            vishub's models; any other name, and a module, is taken for a classifier.
        model: Name or module, see `Pipeline`; None for the task's default model.
        device: See `Pipeline`.

    Raises:
        InputError: If neither is given, there is no such task, or as `Pipeline` says.
    """
    if task is None:
        if model is None:
            raise InputError(f'pipeline() needs a task ({", ".join(pipeline_tasks())}) or a model')
        task = task_of(model)
    return pipeline_class(task)(model=model, device=device)


def pipeline_class(task: str) -> Any:
    """The `Pipeline` class of a task, imported on demand.

    Raises:
        InputError: If there is no such task, or none yet.
    """
    if task not in _PIPELINES:
        fault = 'has no pipeline yet' if task in catalog.tasks() else 'is not a task'
        raise InputError(f"'{task}' {fault}. Tasks that have one: {', '.join(_PIPELINES)}")
    module, name = _PIPELINES[task]
    return getattr(importlib.import_module(module), name)


def pipeline_tasks() -> Tuple[str, ...]:
    """Names of the tasks that have a pipeline."""
    return tuple(_PIPELINES)


def task_of(model: Union[str, nn.Module]) -> str:
    """The task that a model is for, by the catalogue: `classification` for what that does not know.

    Args:
        model: Name, folder of weights (with or without `local-dir:`), `hf-hub:owner/name`, or module. The two in the
            middle say their architecture in config.json.
    """
    if not isinstance(model, str):
        name = pretrained_cfg_of(model).get('architecture') or ''
    elif model.startswith('hf-hub:'):
        from vishub.hub.client import one_sentence
        with one_sentence(model):
            name = load_model_config_from_hf(model.removeprefix('hf-hub:'))[1]
    elif (Path(model.removeprefix('local-dir:')) / 'config.json').is_file():
        config = json.loads((Path(model.removeprefix('local-dir:')) / 'config.json').read_text(encoding='utf-8'))
        name = str(config.get('architecture', ''))
    else:
        name = model
    name = name.removeprefix('vishub/').partition('.')[0]
    return next((row.task for row in catalog.architectures() if row.name == name), 'classification')


def pretrained_cfg_of(model: nn.Module) -> Dict[str, Any]:
    """The model's `pretrained_cfg` as a dict, empty if it has none."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return cfg if isinstance(cfg, dict) else cfg.to_dict()


def _name_of(model: nn.Module) -> str:
    # Without its tag: timm sets that on a random model too, and a result must not claim weights that were not loaded.
    return pretrained_cfg_of(model).get('architecture') or type(model).__name__
