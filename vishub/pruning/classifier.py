"""Pruning a trained image classifier, from its name to a folder of smaller weights."""
import contextlib
import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from vishub.errors import InputError, import_extra
from vishub.models.nvit import NViT
from vishub.pruning.cost import time_model
from vishub.pruning.distillation import DistilledRecipe
from vishub.pruning.engine import Schedule
from vishub.pruning.procedure import Pruned, prune
from vishub.pruning.report import PruningReport
from vishub.pruning.structure import as_nvit, nvit_args
from vishub.tasks.base import choose_device, pretrained_cfg_of
from vishub.tasks.classification.data import ImageData, ImageSet, load_data
from vishub.tasks.classification.metrics import class_order, measure
from vishub.tasks.classification.pipeline import ClassificationPipeline
from vishub.tasks.classification.training import ClassificationRecipe, describe_hardware, to_input
from vishub.training.config import TrainConfig
from vishub.training.loop import EpochSampler, rehearse, train

__all__ = ['ClassifierPruning', 'PrunedFolder', 'prune_classifier']

# Told (what is being done, how much of it is done, 0 to 1).
Progress = Callable[[str, float], None]

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, as PIL converts (ITU-R 601)


@dataclasses.dataclass(frozen=True)
class ClassifierPruning:
    """How a classifier is pruned and fine-tuned.

    Attributes:
        target_latency, target_flops, target_params: Exactly one of them, see `prune`.
        interval, groups_per_step: See `Schedule`.
        latency_weight: See `prune`.
        prune_lr: Learning rate while pruning; 0 leaves the weights as they are.
        epochs: Passes over the training images after pruning; 0 for no fine-tuning.
        lr: Peak learning rate of the fine-tuning.
        batch_size: Images a step, while pruning and after it.
        max_images: Prune and fine-tune on at most so many training images, evenly spread; None for all.
        labels_only: Leave out the unpruned model's answers: train on the labels (and a `teacher`) alone.
        teacher: Name of another classifier of the same classes, whose top answers are labels of the distillation
            head (of the only head, where there is one); usually a CNN.
        augmentation: Policy of the training images, see `AUGMENTATIONS`.
        amp: Mixed precision of the fine-tuning: `no`, `bf16` or `fp16`.
        latency_batch_size: Images a batch when time is measured.
        seed: Seed of all randomness.
        device: See `ClassificationPipeline`.
        tag: Tag of the weights; by default the data's.
        command: Command line, for the card.
    """
    target_latency: Optional[float] = None
    target_flops: Optional[float] = None
    target_params: Optional[float] = None
    interval: int = 20
    groups_per_step: Optional[int] = None
    latency_weight: float = 5e-4
    prune_lr: float = 1e-4
    epochs: int = 5
    lr: float = 1e-4
    batch_size: int = 128
    max_images: Optional[int] = None
    labels_only: bool = False
    teacher: Optional[str] = None
    augmentation: str = 'light'
    amp: str = 'no'
    latency_batch_size: int = 16
    seed: int = 0
    device: Optional[str] = None
    tag: Optional[str] = None
    command: str = ''

    def __post_init__(self) -> None:
        for name, least in (('epochs', 0), ('prune_lr', 0), ('latency_weight', 0), ('interval', 1)):
            if getattr(self, name) < least:
                raise InputError(f'prune: {name} is {getattr(self, name)}; it must be at least {least}')
        for name in ('groups_per_step', 'max_images'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f'prune: {name} is {getattr(self, name)}; it must be at least 1')


@dataclasses.dataclass(frozen=True)
class PrunedFolder:
    """What `prune_classifier` made.

    Attributes:
        folder: `nvit.<tag>`, in timm's Hub layout, with `pruning.json`, `pruning.md` and `pruning.png`.
        report: The figures; its accuracies are those on `split`.
        split: What was measured on, e.g. `test split`.
        metrics: The stored weights' metrics (`top1`, `top1_ci95`, …).
    """
    folder: Path
    report: PruningReport
    split: str
    metrics: Dict[str, Any]

    def to_dict(self) -> Dict[str, Any]:
        """All of it as JSON types."""
        return {
            'folder': str(self.folder), 'split': self.split, 'metrics': self.metrics, **self.report.to_dict()}


class _Teacher(nn.Module):
    """Another classifier behind a student's preparation of pictures and in its order of classes.

    Args:
        pipe: The teacher.
        student: The student.
        order: The teacher's output index of each of the student's classes.
    """

    def __init__(self, pipe: ClassificationPipeline, student: ClassificationPipeline, order: List[int]) -> None:
        super().__init__()
        self.model = pipe.model
        self.side = pipe.input_size[-1]
        self.channels = pipe.input_size[0]
        self.statistics = _statistics(pipe)
        self.student_statistics = _statistics(student)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The student's input (B, C, H, W) -> logits (B, classes)."""
        mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in self.student_statistics)
        x = (x * std + mean).clamp(0, 1)
        if self.channels == 3:
            x = x.expand(-1, 3, -1, -1)
        elif x.shape[1] == 3:
            x = (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        return self.model(to_input(x, self.side, *self.statistics))[:, self.order]


class _Calibration:
    """The recipe's training batches, another order and augmentation at every pass: what `prune` iterates over."""

    def __init__(self, recipe: ClassificationRecipe, config: TrainConfig, side: int) -> None:
        self.recipe, self.config, self.side = recipe, config, side
        self.passes = 0

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        images, config = self.recipe.train_set(), self.config
        sampler = EpochSampler(
            len(images), config, self.passes, first=0, batches=len(images) // config.batch_size, rank=0, world=1)
        self.passes += 1
        for batch in DataLoader(images, batch_sampler=sampler):
            yield self.recipe.prepare(batch, self.side, training=True)


def _statistics(pipe: ClassificationPipeline) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and standard deviation by which a pipeline normalises pictures."""
    normalise = pipe.transform.transforms[-1]
    return tuple(normalise.mean.tolist()), tuple(normalise.std.tolist())


def _in_order_of(pipe: ClassificationPipeline, data: ImageData) -> ImageData:
    """The data with the model's class indices as labels.

    Raises:
        InputError: If the model knows other classes, or takes pictures of other channels.
    """
    if data.train.in_chans != pipe.input_size[0]:
        raise InputError(
            f"'{pipe.name}' takes pictures of {pipe.input_size[0]} channel(s), those of {data.name} have "
            f'{data.train.in_chans}')
    order = np.asarray(class_order(pipe, data.classes))

    def relabelled(images: Optional[ImageSet]) -> Optional[ImageSet]:
        return images and ImageSet(images.images, order[images.labels], images.in_chans)

    classes = [''] * len(order)
    for name, index in zip(data.classes, order):
        classes[index] = name
    return dataclasses.replace(
        data, classes=tuple(classes), train=relabelled(data.train), val=relabelled(data.val),
        test=relabelled(data.test))


def _measured_split(data: ImageData) -> Tuple[ImageSet, str]:
    if data.test is not None:
        return data.test, 'test split'
    if data.val is None:
        raise InputError(f'{data.name} has neither test nor validation images, so nothing could be measured')
    return data.val, 'validation split'


def _test_batches(
        pipe: ClassificationPipeline,
        images: ImageSet,
        progress: Progress,
        batch_size: int = 250,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """(model input, labels) of images, prepared as the pipeline prepares pictures."""
    for start in range(0, len(images), batch_size):
        progress('measuring before and after', start / len(images))
        chosen = range(start, min(start + batch_size, len(images)))
        arrays = (images[index] for index in chosen)  # H, W, C
        pictures = [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
        yield torch.stack([pipe.transform(picture) for picture in pictures]), torch.from_numpy(images.labels[chosen])


def _seconds(before: NViT, after: NViT, batch_size: int, rounds: int = 5) -> Tuple[float, float]:
    """Median seconds of a batch, before and after, measured in turns, so that other load slows both alike."""
    times = [
        tuple(time_model(model, batch_size, repeats=5) for model in (before, after)) for _ in range(rounds)]
    slow, fast = zip(*times)
    return statistics.median(slow), statistics.median(fast)


def prune_classifier(
        model: str,
        data: Union[str, Path],
        output: Union[str, Path],
        options: ClassifierPruning,
        *,
        progress: Optional[Progress] = None,
        show_training: bool = False,
) -> PrunedFolder:
    """Prune a trained ViT or DeiT to a target, fine-tune it, measure it, and store it as `output/nvit.<tag>`.

    The folder appears when all is done and measured; until then there is none, or the one that was there before.

    Args:
        model: Name with weights of timm or vishub, or `local-dir:` and a folder.
        data: Path for `vishub.tasks.classification.data.load_data`, with the classes that the model knows.
        output: Folder to make the result in.
        options: How.
        progress: Told what is being done.
        show_training: Show the training loop's own progress bar.

    Raises:
        InputError: If the output cannot be written, the model cannot be pruned or has other classes than the data or
            the teacher, or the target is out of reach (says what can be reached).
        MissingExtraError: If an extra is not installed.
    """
    tell = progress or (lambda what, share: None)
    output = Path(output)
    rehearse(output)
    for module in ('accelerate', 'albumentations', 'torchmetrics', 'matplotlib'):
        import_extra(module, 'train')  # now, not after an hour of pruning

    pipe = ClassificationPipeline(model, options.device)
    channels, side, width = pipe.input_size
    if side != width:
        raise InputError(f"'{model}' takes pictures of {side} x {width} pixels; only square ones are supported here")
    original = as_nvit(pipe.model)  # a model that cannot be pruned is refused before the data are read
    data = _in_order_of(pipe, load_data(data, channels))
    images, split = _measured_split(data)
    teacher = _load_teacher(options, pipe, data)

    recipe = ClassificationRecipe(
        model, data, augmentation=options.augmentation, label_smoothing=0., mixup=0., seed=options.seed,
        validate_on='none' if data.test is not None else 'val')  # all that is not tested on is trained on
    if options.max_images is not None and options.max_images < len(recipe.data.train):
        chosen = np.linspace(0, len(recipe.data.train) - 1, options.max_images).astype(int)
        recipe.data = dataclasses.replace(recipe.data, train=recipe.data.train.take(chosen))
    recipe.mean, recipe.std = _statistics(pipe)  # the model keeps its own, whatever the data's are
    device = choose_device(options.device)
    with _work_folder(output) as work:
        config = TrainConfig(
            output=work / 'training', resolution=((side, max(options.epochs, 1)),), batch_size=options.batch_size,
            lr=options.lr, amp=options.amp, device='cpu' if device.type == 'cpu' else 'auto', seed=options.seed,
            checkpoint_every=0, progress=show_training)
        samples = len(recipe.data.train)
        if samples < config.batch_size:
            raise InputError(
                f'{samples} training images do not fill one batch of {config.batch_size}; choose a smaller one')
        torch.manual_seed(options.seed)
        start = time.perf_counter()
        model_and_report = prune(
            pipe.model, _Calibration(recipe, config, side),
            target_latency=options.target_latency, target_flops=options.target_flops,
            target_params=options.target_params,
            # Every step removes something, so that no limit is needed: a target within reach is reached.
            schedule=Schedule(options.interval, options.groups_per_step, max_epochs=sys.maxsize),
            latency_weight=options.latency_weight, latency_batch_size=options.latency_batch_size,
            lr=options.prune_lr, cnn_teacher=teacher,
            **({'kl_weight': 0.} if options.labels_only else {}),
            eval_loader=_test_batches(pipe, images, tell),
            progress=lambda batch, share: tell(f'pruning, batch {batch}: {share:.3f} of the original', 1 - share))
        pruned, report = model_and_report
        if options.epochs:
            tell('fine-tuning', 0.)
            student = DistilledRecipe(
                pruned, recipe, teacher=None if options.labels_only else original, cnn_teacher=teacher)
            result = train(student, config)
            pruned = result.model.to(device).eval()
            pruned.set_distilled_training(False)
        wall = time.perf_counter() - start
        report = dataclasses.replace(report, seconds=_seconds(original, pruned, options.latency_batch_size))

        tag = options.tag or data.tag
        pruned.pretrained_cfg = pruned.default_cfg = _stored_cfg(pipe, data, tag)
        staged = work / f'nvit.{tag}'
        training = {
            'command': options.command, 'seed': options.seed, 'epochs': options.epochs, 'wall_s': round(wall, 1),
            'hardware': describe_hardware(device), 'samples': samples, 'recipe': _recipe_facts(options, report),
        }
        stored = _store(
            staged, Pruned(pruned, report), model, data, split, training,
            lambda folder: measure(
                ClassificationPipeline(f'local-dir:{folder}', device), images, data.classes,
                advance=_advancing(tell, 'measuring what was stored', len(images))))
        if options.epochs:
            shutil.copy(work / 'training' / 'log.csv', staged / 'fine_tuning.csv')
        _replace_folder(staged, output / staged.name)
    return dataclasses.replace(stored, folder=output / staged.name)


def _load_teacher(
        options: ClassifierPruning, pipe: ClassificationPipeline, data: ImageData) -> Optional[_Teacher]:
    if options.teacher is None:
        return None
    teacher = ClassificationPipeline(options.teacher, options.device)
    if teacher.input_size[1] != teacher.input_size[2]:
        raise InputError(f"teacher '{options.teacher}' takes pictures that are not square")
    return _Teacher(teacher, pipe, class_order(teacher, data.classes))


def _recipe_facts(options: ClassifierPruning, report: PruningReport) -> Dict[str, Any]:
    """What decided the weights, for the card."""
    facts = dataclasses.asdict(options)
    for name in ('command', 'device', 'tag', 'seed', 'epochs', 'target_latency', 'target_flops', 'target_params'):
        facts.pop(name)
    return {**{f'target_{kind}': share for kind, share in report.target.items()},
            'pruning_batches': report.batches, **facts}


def _stored_cfg(pipe: ClassificationPipeline, data: ImageData, tag: str) -> Dict[str, Any]:
    """What a user of the pruned weights needs to know: the original's preparation of pictures, and the classes."""
    cfg = dict(pretrained_cfg_of(pipe.model))
    mean, std = _statistics(pipe)
    cfg.update(
        architecture='nvit', tag=tag, num_classes=pipe.num_classes, input_size=tuple(pipe.input_size),
        mean=tuple(round(value, 6) for value in mean), std=tuple(round(value, 6) for value in std),
        label_names=list(pipe.label_names or data.classes))
    return cfg


def _store(
        folder: Path,
        pruned: Pruned,
        original: str,
        data: ImageData,
        split: str,
        training: Mapping[str, Any],
        measured: Callable[[Path], Dict[str, Any]],
) -> PrunedFolder:
    """Store the weights as fp16, measure what was stored, and write the figures and the card beside it."""
    from vishub.hub import save_folder

    model, report = pruned
    args = nvit_args(model)
    licence = pretrained_cfg_of(model).get('license') or 'other'
    save_folder(model, folder, metrics={}, card={'licence': licence}, model_args=args)
    figures = measured(folder)
    report = dataclasses.replace(
        report, accuracy={**report.accuracy, 'stored': round(figures['metrics']['top1'], 4)})
    report.save(folder)
    description = _description(report, original, split, training)
    card = {'licence': licence, 'description': description, 'limits': [
        'Pruning keeps what matters for these data: it forgets more than the unpruned model outside of them.']}
    metrics = {'data': data.name, 'split': split, 'training': dict(training), **figures}
    save_folder(model, folder, metrics=metrics, card=card, model_args=args)
    return PrunedFolder(folder, report, split, figures['metrics'])


def _description(report: PruningReport, original: str, split: str, training: Mapping[str, Any]) -> str:
    """The card's first paragraphs: what was pruned, and what it cost and gained."""
    (kind, asked), = report.target.items()
    epochs = training['epochs']
    original = Path(original.removeprefix('local-dir:')).name if original.startswith('local-dir:') else original
    accuracy, (macs, fewer_macs), (params, fewer_params) = report.accuracy, report.macs, report.params
    rows = [
        '| | unpruned | pruned | share |', '|---|---|---|---|',
        f'| Multiply-accumulates | {macs:,} | {fewer_macs:,} | {fewer_macs / macs:.3f} |',
        f'| Parameters | {params:,} | {fewer_params:,} | {fewer_params / params:.3f} |',
    ]
    if report.seconds:
        slow, fast = (1000 * seconds for seconds in report.seconds)
        batch = training['recipe']['latency_batch_size']
        rows.append(f'| Milliseconds a batch of {batch} | {slow:.2f} | {fast:.2f} | {fast / slow:.3f} |')
    rows.append(f'| Top-1 (%), {split} | {accuracy["original"]:.2f} | {accuracy["stored"]:.2f} | |')
    if epochs:
        rows.append(f'| Top-1 (%) before fine-tuning | | {accuracy["dense"]:.2f} | |')
    return (
        f'`{original}` pruned by Hessian-aware saliency to {asked:.2f} of its {kind}'
        f'{", then fine-tuned" if epochs else ""}. Every block has sizes of its own: [pruning.md](pruning.md), figures '
        'in [pruning.json](pruning.json).\n\n'
        + '\n'.join(rows) + '\n\n![Remaining sizes per block](pruning.png)\n')


def _advancing(tell: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        tell(what, done / total)

    return advance


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A hidden folder in `output` that goes away again, whatever happens."""
    work = Path(tempfile.mkdtemp(dir=output, prefix='.pruning-'))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace_folder(new: Path, place: Path) -> None:
    """Move a finished folder to its place; one that is there is moved out of the way first."""
    if place.exists():
        os.replace(place, new.parent / 'replaced')
    os.replace(new, place)
