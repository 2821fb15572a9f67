"""Training on tasks one after the other.

The one loop of `vishub.training` trains one task; a sequence is that loop run once a task. It cannot run once for the
whole sequence: its data, its best weights and its early stopping are those of one task, and between tasks something
happens (the buffer is filled with the best weights, Fisher information is taken). Weights and the optimizer's moments
are carried over from run to run, as in the official script, which keeps one optimizer. Each task has a folder with
its own checkpoint, so that the same command goes on after a kill at any point.

Slides differ in length: a step takes one slide, `grad_accum` gives steps of several.
"""
import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from vishub import catalog
from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.models.conslide import mean_similarity_loss
from vishub.tasks.slide_analysis.continual import score_tasks
from vishub.tasks.slide_analysis.data import EncodedTask, Item, SlideRow, SlideSet, joined
from vishub.tasks.slide_analysis.strategies import METHODS, Strategy, StrategyOptions, make_strategy
from vishub.training.checkpoint import load_checkpoint, load_optimizer
from vishub.training.config import TrainConfig
from vishub.training.loop import train
from vishub.training.recipe import Recipe

__all__ = ['SequenceOptions', 'SlideRecipe', 'create_network', 'earlier_tasks', 'logits_of', 'train_tasks']

_SEQUENCE, _WEIGHTS = 'sequence.json', 'weights.safetensors'


@dataclass(frozen=True)
class SequenceOptions:
    """How a sequence is learnt; the defaults are those of the official script.

    Attributes:
        model: Name that `timm.create_model` knows.
        model_args: Arguments of the model besides `num_classes`.
        method: One of `METHODS`.
        strategy: See `StrategyOptions`.
        warmup_epochs: Epochs before those of the first task, with the similarity loss alone.
        warmup_weight: Of the similarity loss in these.
        sim_weight: Of the similarity loss in all others.
    """
    model: str = 'conslide_hit'
    model_args: Mapping[str, Any] = field(default_factory=dict)
    method: str = 'buro'
    strategy: StrategyOptions = StrategyOptions()
    warmup_epochs: int = 10
    warmup_weight: float = 1e-3
    sim_weight: float = 1e-5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method '{self.method}' is unknown; choose one of {', '.join(METHODS)}")


class SlideRecipe(Recipe):
    """One task of a sequence.

    The loss of a step is CE + sim_weight · mean(sim_loss), over all classes known so far, plus what the strategy adds.

    Args:
        options: Of the sequence.
        num_classes: Classes after this task.
        task: Encoded slides.
        strategy: With its memory of the tasks before.
        before: Folder of the task before; None for the first.
    """

    metric = 'likelihood'

    def __init__(
            self,
            options: SequenceOptions,
            num_classes: int,
            task: EncodedTask,
            strategy: Strategy,
            before: Optional[Path],
    ) -> None:
        self.options, self.num_classes, self.task = options, num_classes, task
        self.strategy, self.before = strategy, before
        self.warmup_epochs = options.warmup_epochs if before is None else 0
        self.model: Any = None

    def describe(self) -> Dict[str, Any]:
        return {
            'model': self.options.model, 'model_args': dict(self.options.model_args), 'task': self.task.name,
            'method': self.options.method, 'classes': self.num_classes, 'warmup_epochs': self.warmup_epochs,
            'warmup_weight': self.options.warmup_weight, 'sim_weight': self.options.sim_weight,
            **dataclasses.asdict(self.options.strategy)}

    def build_model(self) -> nn.Module:
        if self.before is None:
            return create_network(self.options, self.num_classes)
        tensors = load_file(self.before / _WEIGHTS)
        model = create_network(self.options, len(tensors['head.bias']))
        model.load_state_dict(tensors)
        if model.num_classes != self.num_classes:
            model.reset_classifier(self.num_classes, keep=True)
        return model

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Go on with the moments that the optimizer had at the end of the task before."""
        if self.before is None:
            return
        tensors, state = load_checkpoint(self.before / 'checkpoint.safetensors')
        weights = [weight for group in optimizer.param_groups for weight in group['params']]
        moments = {}
        for name, tensor in tensors.get('optimizer', {}).items():
            weight = weights[int(name.partition('/')[0])]
            if tensor.ndim and tensor.shape != weight.shape:  # the classifier has grown: new rows start at 0
                grown = torch.zeros_like(weight, device='cpu')
                grown[:len(tensor)] = tensor
                tensor = grown
            moments[name] = tensor
        load_optimizer(
            optimizer, moments, {**state['optimizer'], 'param_groups': optimizer.state_dict()['param_groups']})

    def train_set(self) -> SlideSet:
        return SlideSet(self.task.train)

    def train_mode(self, model: nn.Module) -> None:
        self.model = model  # replay runs it again within the loss

    def prepare(self, batch: Any, side: int, training: bool) -> Tuple[Any, Any]:
        return (batch['patch'], batch['region']), batch

    def loss(self, output: Any, targets: Any) -> torch.Tensor:
        similarity = mean_similarity_loss(output.sim_loss)
        if int(targets['epoch'][0]) < self.warmup_epochs:
            return self.options.warmup_weight * similarity
        loss = F.cross_entropy(output.logits.float(), targets['label']) + self.options.sim_weight * similarity
        if self.before is not None:
            penalty = self.strategy.penalty(self.model)
            if penalty is not None:
                loss = loss + penalty
        return loss

    @property
    def validates(self) -> bool:
        return bool(self.task.val)

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        """On this task's validation slides, over all classes: `nll`, `acc` (per cent), `likelihood`.

        `likelihood` is the geometric mean, in per cent, of the probability of the true class: the best weights are
        those with the least validation loss, as in the official script.
        """
        if not self.task.val:
            return None
        logits = logits_of(model, self.task.val)
        labels = torch.tensor([item.label for item in self.task.val])
        nll = float(F.cross_entropy(logits, labels))
        accuracy = 100 * float((logits.argmax(1) == labels).float().mean())
        return {'nll': nll, 'acc': accuracy, 'likelihood': 100 * float(torch.tensor(-nll).exp())}


def create_network(options: SequenceOptions, num_classes: int) -> Any:
    """The network of a sequence.

    Raises:
        InputError: If there is no such model, it refuses its arguments, or it takes no features.
    """
    import timm

    import vishub  # noqa: F401  registers our architectures
    if not timm.is_model(options.model.removeprefix('vishub/').split('.')[0]):
        raise catalog.unknown('model', options.model, timm.list_models())
    try:
        model = timm.create_model(options.model, num_classes=num_classes, **options.model_args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"model '{options.model}' refuses {dict(options.model_args)}: {error}") from error
    if not hasattr(model, 'rollout'):
        raise InputError(f"'{options.model}' takes no features of slides: give a model of the task slide_analysis")
    return model


@torch.no_grad()
def logits_of(model: Any, items: Sequence[Item]) -> torch.Tensor:
    """Logits (n, K) of encoded slides, float32 on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    rows = []
    for item in items:
        features = item.load()
        rows.append(model(features.patch.to(device), features.region.to(device)).logits[0].float().cpu())
    return torch.stack(rows)


def train_tasks(
        tasks: Sequence[EncodedTask],
        folder: Path,
        config: TrainConfig,
        options: SequenceOptions,
        continue_from: Optional[Path] = None,
        say: Callable[[str], None] = print,
) -> Optional[Dict[str, Any]]:
    """Learn tasks one after the other, or go on where an earlier call was stopped.

    After each task it is measured on the test slides of all tasks so far, and of the next.

    Args:
        tasks: Encoded tasks, in the order in which they are learnt.
        folder: Gets a folder a task (checkpoint, log, `weights.safetensors`), the memory of the strategy, and
            `sequence.json`.
        config: Of each task; `output` is not used.
        options: Of the sequence.
        continue_from: Folder of an earlier sequence, which stays as it is: the tasks come after its own, and its
            classes keep their numbers.
        say: Gets a line a task.

    Returns:
        The content of `sequence.json`; None if a limit in `config` stopped the run.

    Raises:
        InputError: If the tasks are none, have no slides or features of different widths, or do not fit
            `continue_from`.
    """
    _check(tasks, config)
    folder.mkdir(parents=True, exist_ok=True)
    history = _earlier(continue_from, options)
    known: List[Dict[str, Any]] = history['tasks']
    first = sum(len(task['classes']) for task in known)
    for task in tasks:
        if task.name in [other['name'] for other in known]:
            raise InputError(f"task '{task.name}' has been learnt before: '{continue_from}' knows it")
    labels = [item.label for task in tasks for item in task.train]
    if min(labels) != first:
        raise InputError(f'the first new class has number {min(labels)}; {first} classes are known')
    if continue_from is not None:
        for memory in ('buffer.safetensors', 'ewc.safetensors'):
            if (continue_from / memory).is_file() and not (folder / memory).exists():
                with atomic_path(folder / memory) as temporary:
                    shutil.copyfile(continue_from / memory, temporary)
    numbered: List[Dict[str, Any]] = [*known]
    for task in tasks:
        begin = sum(len(other['classes']) for other in numbered)
        numbered.append({
            'name': task.name, 'classes': list(task.classes),
            'numbers': list(range(begin, begin + len(task.classes))),
            'test': [[item.features, item.label, item.row.path] for item in task.test]})
    num_classes = sum(len(task['classes']) for task in numbered)
    state: Dict[str, Any] = {
        'model': options.model, 'model_args': dict(options.model_args), 'method': options.method,
        'tasks': numbered, 'scores': history['scores'], 'untrained': history['untrained'],
        'last': history['last'], 'seconds': history['seconds']}
    rounds = [joined(tasks)] if options.method == 'joint' else list(tasks)
    before = Path(history['last']) if history['last'] else None
    for number, task in enumerate(rounds, len(known)):
        place = folder / f'{number + 1}-{task.name[:60]}'
        recipe = SlideRecipe(
            options, num_classes, task, make_strategy(options.method, folder, options.strategy, num_classes), before)
        side = config.resolution[0][0]
        epochs = config.epochs + recipe.warmup_epochs
        own = dataclasses.replace(config, output=place, resolution=((side, epochs),), min_lr=config.lr, batch_size=1)
        say(f'task {number + 1} of {len(known) + len(rounds)}: {task.name}, {len(task.train)} slides')
        result = train(recipe, own)
        if not result.finished:
            return None
        model: Any = result.model.cpu()
        with atomic_path(place / _WEIGHTS) as temporary:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
        if not state['untrained']:
            torch.manual_seed(config.seed)
            state['untrained'] = _scores(create_network(options, num_classes), numbered)
        recipe.strategy.end_task(model, task.name, number, task.train, config.seed)
        seen = len(numbered) if options.method == 'joint' else min(number + 2, len(numbered))
        scores = _scores(model, numbered[:seen])
        state['scores'] = [*state['scores'], {**scores, 'tasks': len(numbered) if options.method == 'joint' else
                                              number + 1}]
        state['last'], state['seconds'] = str(place), state['seconds'] + result.wall_s
        before = place
        say(f'  accuracy on {", ".join(t["name"] for t in numbered[:seen])}: '
            + ', '.join(f'{100 * value:.1f}' for value in scores['acc']))
    with atomic_path(folder / _SEQUENCE) as temporary:
        temporary.write_text(json.dumps(state, indent=1) + '\n', encoding='utf-8')
    return state


def earlier_tasks(continue_from: Optional[Path]) -> List[EncodedTask]:
    """The tasks that an earlier sequence learnt, with their test slides alone; none for None.

    Raises:
        InputError: If the folder holds no finished sequence.
    """
    if continue_from is None:
        return []
    return [
        EncodedTask(task['name'], tuple(task['classes']), (), (), tuple(
            Item(features, label, SlideRow(path, task['classes'][task['numbers'].index(label)], Path(path).stem))
            for features, label, path in task['test']))
        for task in _sequence_of(continue_from)['tasks']]


def _sequence_of(folder: Path) -> Dict[str, Any]:
    try:
        return json.loads((folder / _SEQUENCE).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{folder}' holds no finished sequence ({error}): give the output folder of an earlier run") from error


def _check(tasks: Sequence[EncodedTask], config: TrainConfig) -> None:
    if not tasks:
        raise InputError('no task was given: give at least one')
    for task in tasks:
        if not task.train or not task.test:
            raise InputError(f"task '{task.name}' has no {'test' if task.train else 'training'} slides")
    if config.batch_size != 1:
        raise InputError(f'batch_size is {config.batch_size}: slides differ in length, so a step takes one; '
                         'grad_accum gives steps of several')
    shapes = {tuple(item.load().patch.shape[1:]) for task in tasks for item in task.train[:1]}
    if len(shapes) > 1:
        raise InputError(f'the tasks have features of different shapes {sorted(shapes)}: use one encoder and grid')


def _earlier(continue_from: Optional[Path], options: SequenceOptions) -> Dict[str, Any]:
    """What an earlier sequence left."""
    if continue_from is None:
        return {'tasks': [], 'scores': [], 'untrained': {}, 'last': '', 'seconds': 0.}
    state = _sequence_of(continue_from)
    for key, mine in (('model', options.model), ('model_args', dict(options.model_args)), ('method', options.method)):
        if state[key] != mine:
            raise InputError(f"'{continue_from}' was trained with {key} {state[key]}, now {mine}: use the same")
    if options.method == 'joint':
        raise InputError('joint training keeps nothing to go on from: give all tasks at once')
    state['last'] = str(continue_from / Path(state['last']).name)  # the folder may have been moved
    return state


def _scores(model: Any, tasks: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """Scores on the test slides of tasks as `sequence.json` lists them."""
    rows: List[Item] = []
    for task in tasks:
        for features, label, path in task['test']:
            if not Path(features).is_file():
                raise InputError(f"'{features}', test features of task '{task['name']}', are gone: bring them back")
            rows.append(Item(features, label, SlideRow(path, '', Path(path).stem)))
    with torch.no_grad():
        logits = logits_of(model, rows)
    return score_tasks(logits.numpy(), [item.label for item in rows], [task['numbers'] for task in tasks])

