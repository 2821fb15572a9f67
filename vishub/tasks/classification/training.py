"""The recipe that trains an image classifier: any timm model name, any data that `data.load_data` reads."""
import ast
import logging
import platform
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import default_collate

from vishub import catalog
from vishub.errors import InputError
from vishub.tasks.augmentation import check_policy, describe_policy
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.classification.data import AugmentedSet, ImageData, load_data
from vishub.tasks.classification.metrics import classification_metrics, measure, predict_logits
from vishub.tasks.classification.pipeline import ClassificationPipeline
from vishub.training.config import TrainConfig
from vishub.training.freezing import freeze as freeze_parameters
from vishub.training.freezing import freeze_all_but_head, rest_frozen
from vishub.training.loop import TrainResult
from vishub.training.processes import gather_shares, my_share
from vishub.training.recipe import Recipe

__all__ = ['ClassificationRecipe', 'describe_hardware', 'parse_model_args', 'to_input']


def parse_model_args(items: Sequence[str]) -> Dict[str, Any]:
    """Read `['window_size=3', 'act_layer=gelu']` as constructor arguments; values are Python literals or strings.

    Raises:
        InputError: If an item is not `name=value`.
    """
    arguments: Dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition('=')
        if not equals or not name.isidentifier():
            raise InputError(f"model argument '{item}' is not name=value, as in window_size=3")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def describe_hardware(device: torch.device) -> str:
    """The device and the number of threads, for the card."""
    if device.type == 'cuda':
        return f'{torch.cuda.get_device_name(device)}, torch {torch.__version__}'
    name = platform.processor() or platform.machine()
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            name = next((line.split(':', 1)[1].strip() for line in file if line.startswith('model name')), name)
    except OSError:
        pass
    return f'{torch.get_num_threads()} thread(s) of {name}, torch {torch.__version__}'


def to_input(
        images: torch.Tensor,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
) -> torch.Tensor:
    """uint8 or 0..1 float images `(B, C, H, W)` -> normalised float32 `(B, C, side, side)`.

    The resizing is the bicubic one with antialiasing that PIL, and so the pipeline, applies.
    """
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, size=(side, side), mode='bicubic', antialias=True, align_corners=False).clamp_(0, 1)
    shape = (1, -1, 1, 1)
    return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)


class ClassificationRecipe(Recipe):
    """Label smoothing, mixup or cutmix, albumentations; accuracy of the stored weights at the end.

    Args:
        model: Name that `timm.create_model` knows (own architectures included), e.g. `favit_small64`.
        data: Path for `load_data`, or data already read.
        model_args: Further arguments of the model, e.g. `{'window_size': 3}`.
        augmentation: Policy name of `data.AUGMENTATIONS`, or an albumentations JSON or YAML file.
        freeze: Patterns of parameter names that are not trained, e.g. `['stem', 'stages.[01].*']`.
        linear_probe: Train the classifier alone.
        class_weights: `balanced` weighs each image by N / (K * images of its class), so that every class counts alike
            over an epoch; None weighs all images alike.
        label_smoothing: Share of the target spread over all classes.
        mixup: Alpha of mixup (Zhang et al. 2018); 0 switches it off.
        cutmix: Alpha of cutmix (Yun et al. 2019); 0 switches it off. With both, each batch takes one by chance.
        mix_prob: Share of the batches that are mixed at all.
        validate_on: `val`, `test` or `none`: see `ImageData.with_validation_on`.
        in_chans: 1 or 3 for image folders; other data have their own.
        check: Decode every file of an image folder once before training.
        seed: Seed of the augmentation; give the same as in the config.
        tag: Tag of the weights, as in `favit_small64.<tag>`; by default the data's name.
        command: Command line, for the card.
    """

    metric = 'top1'

    def __init__(
            self,
            model: str,
            data: Union[str, Path, ImageData],
            *,
            model_args: Optional[Mapping[str, Any]] = None,
            augmentation: str = 'medium',
            freeze: Sequence[str] = (),
            linear_probe: bool = False,
            class_weights: Optional[str] = None,
            label_smoothing: float = 0.1,
            mixup: float = 0.2,
            cutmix: float = 0.,
            mix_prob: float = 1.,
            validate_on: str = 'val',
            in_chans: int = 3,
            check: bool = True,
            seed: int = 0,
            tag: Optional[str] = None,
            command: str = '',
    ):
        if class_weights not in (None, 'balanced'):
            raise InputError(f"class_weights is '{class_weights}'; it is balanced, or not given")
        if freeze and linear_probe:
            raise InputError('freeze and linear_probe exclude each other: a linear probe freezes all but the head')
        check_policy(augmentation)
        self.model_name, self.model_args = model, dict(model_args or {})
        self.freeze, self.linear_probe, self.class_weights = tuple(freeze), linear_probe, class_weights
        self._remarks: List[str] = []
        read = data if isinstance(data, ImageData) else load_data(data, in_chans, check=check)
        self.data = read.with_validation_on(validate_on)
        self.augmentation, self.label_smoothing = augmentation, label_smoothing
        self.mixup, self.cutmix, self.mix_prob = mixup, cutmix, mix_prob
        self.validate_on, self.seed, self.command = validate_on, seed, command
        self.tag = tag or self.data.tag
        self.num_classes = len(self.data.classes)
        self.loss_weights = balanced_weights(self.data.train.labels, self.num_classes) if class_weights else None
        # Channel statistics of the training images, from at most 2000 of them, evenly spread.
        self.mean, self.std = channel_statistics(self.data)
        self._mix = None
        if mixup > 0 or cutmix > 0:
            from timm.data import Mixup
            self._mix = Mixup(
                mixup_alpha=mixup, cutmix_alpha=cutmix, prob=mix_prob, label_smoothing=label_smoothing,
                num_classes=self.num_classes)

    def describe(self) -> Dict[str, Any]:
        return {
            'model': self.model_name, 'model_args': self.model_args, 'data': self.data.name,
            'augmentation': describe_policy(self.augmentation), 'label_smoothing': self.label_smoothing,
            'mixup': self.mixup, 'cutmix': self.cutmix, 'mix_prob': self.mix_prob, 'validate_on': self.validate_on,
            # None is what checkpoints have that are older than these options
            'freeze': list(self.freeze) or None, 'linear_probe': self.linear_probe or None,
            'class_weights': self.class_weights,
        }

    def build_model(self) -> nn.Module:
        import timm

        import vishub  # noqa: F401  registers our architectures
        if ':' not in self.model_name and not timm.is_model(self.model_name.removeprefix('vishub/').split('.')[0]):
            raise catalog.unknown('model', self.model_name, timm.list_models())
        try:
            model = timm.create_model(
                self.model_name, num_classes=self.num_classes, in_chans=self.data.train.in_chans, **self.model_args)
        except (TypeError, ValueError) as error:
            raise InputError(f"model '{self.model_name}' refuses its arguments {self.model_args}: {error}") from error
        self._remarks = []
        told = pretrained_cfg_of(model).get('num_classes')
        if self.model_args.get('pretrained') and told != self.num_classes:
            self._remarks.append(
                f'head re-initialised for {self.num_classes} classes; the pretrained one told {told} apart')
        if self.linear_probe:
            freeze_all_but_head(model)
        elif self.freeze:
            freeze_parameters(model, self.freeze)
        total, trained = (
            sum(p.numel() for p in model.parameters() if p.requires_grad or whole) for whole in (True, False))
        if trained < total:
            self._remarks.append(f'{trained:,} of {total:,} parameters are trained, the others are frozen')
        return model

    def remarks(self) -> Sequence[str]:
        return self._remarks

    def train_mode(self, model: nn.Module) -> None:
        if self.linear_probe or self.freeze:
            rest_frozen(model)

    def preview(self, side: int) -> Optional[Image.Image]:
        samples = self.train_set()
        count = min(32, len(samples)) // 2 * 2  # mixup mixes pairs
        if count == 0:
            return None
        indices = np.random.default_rng([self.seed, 0]).permutation(len(samples))[:count]
        batch = default_collate([samples[0, int(index), side] for index in indices])
        inputs, targets = self.prepare(batch, side, training=True)
        shares = targets if targets.ndim == 2 else F.one_hot(targets, self.num_classes).float()
        mean, std = (inputs.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return sample_grid(inputs * std + mean, shares, self.data.classes)

    def train_set(self) -> AugmentedSet:
        return AugmentedSet(self.data.train, self.augmentation, self.seed)

    def prepare(self, batch: Any, side: int, training: bool) -> Tuple[torch.Tensor, torch.Tensor]:
        """(uint8 `(B, C, H, W)`, labels `(B,)`) -> (normalised `(B, C, side, side)`, labels or `(B, K)` shares)."""
        images, labels = batch
        x = images.float().div_(255)
        if training and self._mix is not None:
            # before resizing, where pixels are fewest; the mean of two images commutes with resizing
            x, labels = self._mix(x, labels)
        return to_input(x, side, self.mean, self.std), labels

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # mixed targets are shares of classes, already smoothed
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.
        if self.loss_weights is None:
            return F.cross_entropy(output, targets, label_smoothing=smoothing)
        weights = self.loss_weights.to(output.device)
        # divided by the number of images, not by the sum of their weights: so that many processes give what one gives
        return F.cross_entropy(output, targets, weight=weights, label_smoothing=smoothing, reduction='none').mean()

    @property
    def validates(self) -> bool:
        return self.data.val is not None

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        split = self.data.val
        if split is None:
            return None

        def prepare(images: Iterator[torch.Tensor]) -> torch.Tensor:
            if split.native_side is None:  # files of any size
                return torch.cat([to_input(image[None], side, self.mean, self.std) for image in images])
            return to_input(torch.stack(list(images)).to(device), side, self.mean, self.std)

        share = predict_logits(model, split.take(my_share(len(split))), prepare, device=device)
        logits = gather_shares(share, len(split))
        metrics = classification_metrics(logits, split.labels)
        return {key: metrics[key] for key in ('top1', 'nll', 'ece')}

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> Path:
        """Store the weights as fp16, load what was stored, evaluate that, and store the figures beside it."""
        from vishub.hub import save_folder
        side = config.resolution[-1][0]
        # architecture without a tag: a fine-tuned model is no longer the tagged one
        architecture = self.model_name.split('/')[-1].split('.')[0]
        folder = Path(config.output) / f'{architecture}.{self.tag}'
        model = self.stored_form(model, architecture, side)
        arguments = {**self.model_args, 'in_chans': self.data.train.in_chans}
        for key in ('drop_rate', 'drop_path_rate', 'pretrained'):  # they belong to training
            arguments.pop(key, None)
        save_folder(model, folder, metrics={}, card={}, model_args=arguments)
        metrics = {
            'data': self.data.name,
            'training': {
                'command': self.command, 'seed': config.seed, 'epochs': config.epochs,
                'resolution': [list(phase) for phase in config.resolution], 'wall_s': round(result.wall_s, 1),
                'hardware': describe_hardware(next(model.parameters()).device), 'samples': len(self.data.train),
                'recipe': {**self.describe(), **config.fingerprint()},
            },
            **self.final_figures(folder, next(model.parameters()).device),
        }
        save_folder(model, folder, metrics=metrics, card={}, model_args=arguments)
        logging.getLogger('vishub.training.main').info('stored %s: %s', folder, metrics.get('metrics'))
        return folder

    def stored_form(self, model: nn.Module, architecture: str, side: int) -> nn.Module:
        """Write into the model's pretrained_cfg what a user of the weights needs to know."""
        cfg = dict(pretrained_cfg_of(model))
        channels = self.data.train.in_chans
        cfg.update(
            architecture=architecture, tag=self.tag, num_classes=self.num_classes,
            input_size=(channels, side, side), test_input_size=None, mean=tuple(self.mean), std=tuple(self.std),
            crop_pct=1.0, test_crop_pct=None, crop_mode='squash', interpolation='bicubic',
            label_names=list(self.data.classes), url='', file='', state_dict=None, hf_hub_filename=None,
            hf_hub_id=f'vishub/{architecture}.{self.tag}', license='apache-2.0',
        )
        holder: Any = model
        holder.pretrained_cfg = holder.default_cfg = cfg
        return model

    def final_figures(self, folder: Path, device: torch.device) -> Dict[str, Any]:
        """Figures on the test split, or on the validation split where there is no other; says which.

        They are the stored weights', through the pipeline: what a user of the folder gets.
        """
        split, name = (self.data.test, 'test') if self.data.test is not None else (self.data.val, 'validation')
        if split is None:
            return {'split': None, 'num_test': 0, 'metrics': {}}
        pipe = ClassificationPipeline(f'local-dir:{folder}', device)
        return {'split': f'{name} split', **measure(pipe, split, self.data.classes)}


def balanced_weights(labels: np.ndarray, num_classes: int) -> torch.Tensor:
    """Weight of each class, float32 `(K,)`: N / (K * its images), so that the weights' mean over the images is 1."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.tensor(len(labels) / (num_classes * np.maximum(counts, 1)), dtype=torch.float32)


def sample_grid(images: torch.Tensor, shares: torch.Tensor, classes: Sequence[str]) -> Image.Image:
    """A grid of samples, eight a row, each under the classes that it counts for.

    Args:
        images: `(B, C, H, W)`, values 0 to 1 (others are clipped), one or three channels.
        shares: Share of each class in each image, `(B, K)`, 0 to 1.
        classes: K names.
    """
    tile, line, columns = 128, 14, 8
    rows = -(-len(images) // columns)
    grid = Image.new('RGB', (tile * min(columns, len(images)), rows * (tile + line)), 'white')
    draw = ImageDraw.Draw(grid)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # B, H, W, C
    for number, (picture, share) in enumerate(zip(pixels, shares)):
        left, top = number % columns * tile, number // columns * (tile + line)
        shown = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).convert('RGB')
        grid.paste(shown.resize((tile - 2, tile - 2), Image.Resampling.NEAREST), (left + 1, top + line))
        parts = [(float(v), i) for v, i in zip(*share.topk(min(2, len(classes))))]
        text = ', '.join(f'{classes[i]} {v:.0%}' if v < 0.995 else classes[i] for v, i in parts if v > 0.05)
        draw.text((left + 2, top + 1), text[:tile // 6], fill='black')
    return grid


def channel_statistics(data: ImageData, count: int = 2000) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and standard deviation of each channel, values 0 to 1, over up to `count` evenly spread training images."""
    images = data.train
    if images.native_side is None:
        count = min(count, 200)  # files: decoding takes time
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    pixels = np.concatenate([images[i].reshape(-1, images.in_chans) for i in chosen]).astype(np.float64) / 255
    mean, std = pixels.mean(axis=0), pixels.std(axis=0)
    return tuple(round(float(v), 4) for v in mean), tuple(round(max(float(v), 1e-3), 4) for v in std)
