"""Classification: a picture in, the most probable classes out, and a heat map of what spoke for the first."""
import os
import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torchvision.transforms import CenterCrop, Resize

from vishub.errors import InputError
from vishub.tasks import drawing
from vishub.tasks.base import Pipeline, Progress, Result, pretrained_cfg_of
from vishub.tasks.images import DecodedImage, ImageInput, decode_image

__all__ = ['ClassificationPipeline', 'ClassificationResult', 'Prediction', 'class_activation_map']

# The shorter side is scaled to the model's input: of a longer picture the centre crop would see less than a percent.
MAX_ASPECT_RATIO = 100

Box = Tuple[float, float, float, float]


@dataclass(frozen=True)
class Prediction:
    """One class and how probable the model holds it.

    Attributes:
        label: Name of the class; `class 7` where the model does not name its classes.
        index: Its place in the model's output.
        probability: 0..1; those of all classes sum to 1.
    """
    label: str
    index: int
    probability: float


@dataclass(frozen=True, eq=False)
class ClassificationResult(Result):
    """What a classifier says of one picture.

    Attributes:
        predictions: The most probable classes, best first.
        image: The picture as decoded: RGB, upright.
        heatmap: Evidence for one class, float32, H x W of `image`, 0..1 (0 outside the crop that the model saw);
            None if it was not asked for, or `warnings` say why.
        model: Name of the model.
        latency_ms: Milliseconds from the prepared batch to its scores, divided by the pictures in the batch; decoding,
            scaling and the heat map are not in it. The first call on a device is slower than the others.
        num_params: Parameters of the model.
        source: Path or file name; None for pixels given directly.
        heatmap_index: The class that the heat map speaks of; None without heat map.
        warnings: What was left out or could not be done, one sentence each.
    """
    predictions: Tuple[Prediction, ...]
    image: Image.Image = field(repr=False)
    heatmap: Optional[np.ndarray] = field(repr=False)
    model: str
    latency_ms: float
    num_params: int
    source: Optional[str] = None
    heatmap_index: Optional[int] = None
    warnings: Tuple[str, ...] = ()

    def to_dict(self) -> Dict[str, Any]:
        """All but the pixels. Of the heat map: its class and the pixel `[x, y]` at which it is highest."""
        heatmap = None
        if self.heatmap is not None:
            y, x = np.unravel_index(self.heatmap.argmax(), self.heatmap.shape)
            heatmap = {'index': self.heatmap_index, 'peak': [int(x), int(y)]}
        return {
            'source': self.source,
            'model': self.model,
            'width': self.image.width,
            'height': self.image.height,
            'predictions': [
                {'label': p.label, 'index': p.index, 'probability': p.probability} for p in self.predictions],
            'heatmap': heatmap,
            'latency_ms': round(self.latency_ms, 3),
            'num_params': self.num_params,
            'warnings': list(self.warnings),
        }

    def summary(self) -> List[str]:
        """One line a class: how probable it is, and its name."""
        return [f'{p.probability:6.1%}  {p.label}' for p in self.predictions]

    def plot(self) -> Image.Image:
        """The picture, the heat map if there is one, and the classes as labelled bars, in one RGB picture."""
        margin, gap, panel, bars_width, header, row_height = 40, 32, 460, 480, 92, 68
        pictures = [drawing.fit(self.image, panel, panel)]
        if self.heatmap is not None:
            pictures.append(drawing.fit(drawing.overlay_heat(self.image, self.heatmap), panel, panel))
        bars_left = margin + sum(picture.width + gap for picture in pictures)
        legend = 40 if self.heatmap is not None else 0
        body = max(pictures[0].height + legend, row_height * len(self.predictions) - gap // 2)
        canvas = Image.new('RGB', (bars_left + bars_width + margin, header + body + margin), drawing.PAPER)
        draw = ImageDraw.Draw(canvas)

        title, small = drawing.font(28), drawing.font(18)
        facts = f'{self.num_params / 1e6:.1f} M parameters, {self.latency_ms:.0f} ms'
        facts_left = canvas.width - margin - small.getlength(facts)
        draw.text((facts_left, 40), facts, fill=drawing.MUTED, font=small)
        name = f'{self.model}: {os.path.basename(self.source)}' if self.source else self.model
        draw.text(
            (margin, 32), drawing.elide(name, title, facts_left - gap - margin), fill=drawing.INK, font=title)

        left = margin
        for picture in pictures:
            canvas.paste(picture, (left, header))
            left += picture.width + gap
        if self.heatmap is not None:
            self._draw_legend(canvas, draw, left - gap - pictures[1].width, header + pictures[1].height + 16)
        rows = [(p.label, p.probability) for p in self.predictions]
        drawing.draw_bars(draw, (bars_left, header), bars_width, row_height, rows)
        return canvas

    def _draw_legend(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        scale = drawing.heat_colours(np.linspace(0, 1, 96)[None].repeat(12, axis=0))  # 12, 96, 3
        canvas.paste(Image.fromarray(scale), (left, top + 4))
        labels = [p.label for p in self.predictions if p.index == self.heatmap_index]
        label = labels[0] if labels else f'class {self.heatmap_index}'
        text = drawing.elide(f'evidence for {label}', drawing.font(18), 340)
        draw.text((left + 108, top - 2), text, fill=drawing.MUTED, font=drawing.font(18))


@dataclass(frozen=True)
class ImageFacts:
    """What a row of a table says of a picture besides its classes.

    Attributes:
        width, height: Of the decoded picture, in pixels.
        source: Path.
        warnings: As in `DecodedImage`.
    """
    width: int
    height: int
    source: Optional[str]
    warnings: Tuple[str, ...]


@dataclass(frozen=True)
class ImagePreparer:
    """Path -> the model's input and `ImageFacts`. Knows no model, so it is cheap to send to another process."""
    transform: Any
    grey: bool

    def __call__(self, path: str) -> Tuple[torch.Tensor, ImageFacts]:
        """Decode and prepare one picture: float32, C x H x W, normalised.

        Raises:
            InputError: If it cannot be decoded, or is too long and thin.
        """
        decoded = ClassificationPipeline._decode(path, '')
        image = decoded.image.convert('L') if self.grey else decoded.image
        return self.transform(image), ImageFacts(*image.size, decoded.source, decoded.warnings)


class ClassificationPipeline(Pipeline):
    """Classify pictures with any model of vishub or timm.

        pipe = ClassificationPipeline('favit_b2.cifar10')
        pipe('horse.jpg').predictions[0].label

    Pictures are prepared as the model's `pretrained_cfg` says (size, crop, mean, standard deviation). A model with one
    input channel gets the picture in grey. Class names are the configuration's `label_names`, else those of ImageNet
    where the number of classes is one of ImageNet's.

    Args:
        model: See `Pipeline`. A module needs a `pretrained_cfg` with at least `input_size`, `mean` and `std`.
        device: See `Pipeline`.

    Raises:
        InputError: If the module has no `pretrained_cfg`, no classes, or an input of neither 1 nor 3 channels; or as
            `Pipeline` says.

    Attributes:
        label_names: Names of all classes in the model's order; None if they are not known.
        input_size: Channels, height, width of what the model gets.
    """

    task = 'classification'
    default_model = 'favit_b2.cifar10'

    def __init__(
            self,
            model: Union[str, nn.Module, None] = None,
            device: Union[str, torch.device, None] = None,
    ):
        super().__init__(model, device)
        cfg = pretrained_cfg_of(self.model)
        if not cfg.get('input_size'):
            raise InputError(
                f"'{self.name}' does not say how to prepare pictures: set model.pretrained_cfg = "
                f"{{'input_size': (3, 224, 224), 'mean': (...), 'std': (...)}}"
            )
        self.num_classes = getattr(self.model, 'num_classes', cfg.get('num_classes'))
        if self.num_classes == 0:
            raise InputError(f"'{self.name}' has no classes (num_classes=0): give a model with a classifier")
        config = _data_config(self.model, self.name, cfg)
        self.input_size = config['input_size']
        self.transform = create_transform(**config, is_training=False)
        self.label_names = _label_names(cfg, self.num_classes)

    def __call__(
            self,
            image: Union[ImageInput, Sequence[ImageInput]],
            top_k: int = 5,
            heatmap: bool = False,
            batch_size: int = 8,
            heatmap_index: Optional[int] = None,
            progress: Optional[Progress] = None,
    ) -> Union[ClassificationResult, List[ClassificationResult]]:
        """Classify one picture, or a list of them.

        Args:
            image: Anything that `vishub.tasks.images.decode_image` takes, or a list of such; a list gives a list of
                results in the same order.
            top_k: How many classes to return, at most all.
            heatmap: Also compute where the evidence lies, see `class_activation_map`. This runs the model a second
                time, with gradients; the scores stay the same.
            batch_size: Pictures run at once when a list is given.
            heatmap_index: Class that the heat map speaks of; the most probable one by default.
            progress: Called with (pictures done, pictures in all) before the first batch and after each.

        Raises:
            InputError: If a picture cannot be decoded (in a list: nothing is returned for the others either), is more
                than 100 times longer than wide or wider than long, or an option is out of range.
        """
        if top_k < 1:
            raise InputError(f'top_k is {top_k}: give 1 or more')
        several = isinstance(image, (list, tuple))
        inputs: List[Tuple[int, Any]] = list(enumerate(image if isinstance(image, (list, tuple)) else [image]))

        def run(batch: List[Tuple[int, Any]]) -> List[ClassificationResult]:
            decoded = [self._decode(item, f'image {number + 1} of {len(inputs)}: ' if several else '')
                       for number, item in batch]
            return self._classify(decoded, top_k, heatmap, heatmap_index)

        results = self.run_batches(inputs, run, batch_size, progress)
        return results if several else results[0]

    @staticmethod
    def _decode(image: ImageInput, place: str) -> DecodedImage:
        try:
            decoded = decode_image(image)
            width, height = decoded.image.size
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                name = f"'{decoded.source}'" if decoded.source else 'the picture'
                raise InputError(
                    f'{name} is {width} x {height} pixels, too long and thin to classify: crop it so that one side '
                    f'is at most {MAX_ASPECT_RATIO} times the other'
                )
        except InputError as error:
            raise InputError(f'{place}{error}') from error.__cause__
        return decoded

    def _classify(
            self,
            decoded: List[DecodedImage],
            top_k: int,
            heatmap: bool,
            heatmap_index: Optional[int],
    ) -> List[ClassificationResult]:
        prepared = [self.prepare(item.image) for item in decoded]
        batch = torch.stack([tensor for tensor, _ in prepared])  # B, C, H, W
        start = time.perf_counter()
        batch = batch.to(self.device)
        probabilities = self._probabilities(batch)
        latency_ms = (time.perf_counter() - start) * 1000 / len(decoded)
        num_classes = probabilities.shape[-1]
        if heatmap_index is not None and not 0 <= heatmap_index < num_classes:
            raise InputError(f'heatmap_index is {heatmap_index}: give 0 to {num_classes - 1}')
        best, indices = probabilities.topk(min(top_k, num_classes), dim=-1)

        heatmaps: List[Optional[np.ndarray]] = [None] * len(decoded)
        explained: List[Optional[int]] = [None] * len(decoded)
        warnings: Tuple[str, ...] = ()
        if heatmap:
            classes = indices[:, 0] if heatmap_index is None else torch.full_like(indices[:, 0], heatmap_index)
            evidence = class_activation_map(self.model, batch, classes.to(self.device))
            if evidence is None:
                warnings = (f"'{self.name}' gives no heat map: no feature map that it shows bears on the score.",)
            else:
                explained = classes.tolist()
                heatmaps = [_place(one, box, item.image.size)
                            for one, (_, box), item in zip(evidence.cpu().numpy(), prepared, decoded)]
        return [
            ClassificationResult(
                predictions=tuple(
                    Prediction(self.label(i), i, p) for i, p in zip(indices[n].tolist(), best[n].tolist())),
                image=item.image,
                heatmap=heatmaps[n],
                model=self.name,
                latency_ms=latency_ms,
                num_params=self.num_params,
                source=item.source,
                heatmap_index=explained[n],
                warnings=item.warnings + warnings,
            )
            for n, item in enumerate(decoded)
        ]

    def _probabilities(self, batch: torch.Tensor) -> torch.Tensor:
        """B, C, H, W -> B, num_classes on the CPU; the copy waits for an accelerator to finish."""
        with torch.inference_mode():
            probabilities = self.model(batch.to(self.device, non_blocking=True)).float().softmax(dim=-1).cpu()
        if not probabilities.isfinite().all():
            raise InputError(f"'{self.name}' gave scores that are not finite: its weights are damaged")
        if self.label_names and len(self.label_names) != probabilities.shape[-1]:
            raise InputError(
                f"'{self.name}' has {probabilities.shape[-1]} classes but names for {len(self.label_names)}")
        return probabilities

    def preparer(self) -> ImagePreparer:
        return ImagePreparer(self.transform, grey=self.input_size[0] == 1)

    def rows(  # type: ignore[override]  # a task names its options
            self,
            batch: torch.Tensor,
            facts: Sequence[ImageFacts],
            top_k: int = 5,
    ) -> List[Dict[str, Any]]:
        """One row of a table a picture; what `ClassificationResult.to_dict` has, without latency and heat map.

        Args:
            batch: Pictures as `preparer()` made them, B x C x H x W.
            facts: What it said of them.
            top_k: How many classes a row has, at most all.
        """
        if top_k < 1:
            raise InputError(f'top_k is {top_k}: give 1 or more')
        probabilities = self._probabilities(batch)
        best, indices = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
        return [
            {
                'source': item.source,
                'model': self.name,
                'width': item.width,
                'height': item.height,
                'predictions': [
                    {'label': self.label(i), 'index': i, 'probability': p} for i, p in zip(classes, values)],
                'warnings': list(item.warnings),
            }
            for item, classes, values in zip(facts, indices.tolist(), best.tolist())
        ]

    def label(self, index: int) -> str:
        """Name of the class at `index` of the model's output."""
        return self.label_names[index] if self.label_names else f'class {index}'

    def prepare(self, image: Image.Image) -> Tuple[torch.Tensor, Box]:
        """RGB image -> the model's input C, H, W and the box (left, top, right, bottom) of `image` that it shows.

        The box is in pixels of `image` and goes beyond it where the transform pads.
        """
        if self.input_size[0] == 1:
            image = image.convert('L')
        # Where the pixel at x of the image is now: x * scale - shift.
        scale, shift, size = [1.0, 1.0], [0.0, 0.0], image.size
        step: Any = image  # later the tensor
        for transform in self.transform.transforms:
            step = transform(step)
            if isinstance(transform, (Resize, ResizeKeepRatio)):
                scale = [new / old for new, old in zip(step.size, size)]
                size = step.size
            elif isinstance(transform, (CenterCrop, CenterCropOrPad)):
                # Both round the same way: down where they pad, to the nearest (even) where they cut.
                shift = [
                    float(int(round((old - new) / 2))) if old >= new else -float((new - old) // 2)
                    for new, old in zip(step.size, size)
                ]
                size = step.size
        left, top = shift[0] / scale[0], shift[1] / scale[1]
        return step, (left, top, left + size[0] / scale[0], top + size[1] / scale[1])


def _data_config(model: nn.Module, name: str, cfg: Dict[str, Any]) -> Dict[str, Any]:
    """timm's data configuration for the model as it was built, which may differ from its `pretrained_cfg`."""
    config = resolve_data_config(pretrained_cfg=cfg)
    channels, height, width = config['input_size']
    # `create_model(..., in_chans=1, img_size=64)` changes the model, not its pretrained_cfg.
    first = cfg.get('first_conv')
    if isinstance(first, str) and first in dict(model.named_modules()):
        channels = getattr(model.get_submodule(first), 'in_channels', channels)
    if channels not in (1, 3):
        raise InputError(f"'{name}' takes {channels} channels: pictures have 1 (grey) or 3 (RGB)")
    patch_embed: Any = getattr(model, 'patch_embed', None)
    if getattr(patch_embed, 'strict_img_size', False) and patch_embed.img_size:
        height, width = patch_embed.img_size
    config['input_size'] = (channels, height, width)
    for key in ('mean', 'std'):
        values = tuple(config[key])
        if len(values) != channels:
            values = (sum(values) / len(values),) * channels
        config[key] = values
    return config


def _label_names(cfg: Dict[str, Any], num_classes: Optional[int]) -> Optional[Tuple[str, ...]]:
    names = cfg.get('label_names')
    if names and num_classes in (None, len(names)):  # a model with a new head keeps the old names in its configuration
        return tuple(map(str, names))
    subset = infer_imagenet_subset({'num_classes': num_classes})
    if subset is None or num_classes is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(num_classes))


# Autograd nodes that only move values about: behind them lies the tensor that the model itself goes on with.
_MOVES = frozenset((
    'AliasBackward0', 'CloneBackward0', 'PermuteBackward0', 'ReshapeAliasBackward0', 'SliceBackward0',
    'TransposeBackward0', 'UnsafeViewBackward0', 'ViewBackward0',
))


def class_activation_map(model: Any, x: torch.Tensor, classes: torch.Tensor) -> Optional[torch.Tensor]:
    """Where in the picture the evidence for a class lies.

    Grad-CAM (Selvaraju et al., 2017, arXiv 1610.02391, equations 1 and 2): the channels of the last feature map,
    weighted by the gradient of the class's score averaged over positions, summed, positive part, divided by the
    maximum. With global average pooling and a linear classifier this is exactly how the score comes about. The score
    of a vision transformer with a class token does not depend on the last patch tokens, so the map is taken one block
    earlier there, and only hints at what mattered. (Weighting each position by its own gradient would not do: behind
    a layer norm, tokens and gradients are orthogonal, and nothing but rounding would be left.)

    Nothing is hooked into the model and no `.grad` is touched, so threads may share it.

    Args:
        model: timm-style classifier in evaluation mode, with `forward_intermediates` and `forward_head`.
        x: Input, B x C x H x W.
        classes: Class of each picture, int64, B.

    Returns:
        float32, B x h x w in the size of the feature map, 0..1; all 0 where nothing speaks for the class. None if the
        model has no such methods or its score depends on no feature map.
    """
    if not (hasattr(model, 'forward_intermediates') and hasattr(model, 'forward_head')):
        return None
    with torch.enable_grad():
        # The input asks for gradients, so that this works for frozen models too.
        features, maps = model.forward_intermediates(x.detach().clone().requires_grad_())
        if not maps:
            return None
        score = model.forward_head(features).gather(1, classes[:, None]).sum()
    height, width = maps[-1].shape[-2:]
    # The final features first (on the way to the score by construction), then the last two maps.
    tensors = [features, *reversed(maps[-2:])]
    gradients = torch.autograd.grad(score, [_gradient_edge(t) for t in tensors], allow_unused=True)
    for tensor, gradient in zip(tensors, gradients):
        if gradient is None:
            continue
        prefix = getattr(model, 'num_prefix_tokens', 0)
        size = (height, width) if tensor is features else tuple(tensor.shape[-2:])
        activation, slope = _as_map(tensor, size, prefix), _as_map(gradient, size, prefix)
        if activation is None or slope is None or activation.shape != slope.shape or not slope.any():
            continue
        weight = slope.float().mean(dim=(2, 3), keepdim=True)  # B, C, 1, 1
        evidence = (activation.detach().float() * weight).sum(dim=1).relu()  # B, h, w
        return evidence / evidence.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return None


def _gradient_edge(tensor: torch.Tensor) -> GradientEdge:
    """The place in the autograd graph where `tensor` comes from.

    forward_intermediates returns reshaped copies, which do not lie on the way from the input to the score themselves.
    """
    edge = get_gradient_edge(tensor)
    while edge.node.name() in _MOVES:
        node, output = edge.node.next_functions[0]
        if node is None:
            break
        edge = GradientEdge(node, output)
    return edge


def _as_map(tensor: torch.Tensor, size: Tuple[int, int], prefix: int) -> Optional[torch.Tensor]:
    """B x C x h x w, B x h x w x C or B x ([prefix +] h * w) x C -> B x C x h x w; None for any other shape."""
    height, width = size
    if tensor.ndim == 4 and tuple(tensor.shape[2:]) == size:
        return tensor
    if tensor.ndim == 4 and tuple(tensor.shape[1:3]) == size:
        return tensor.permute(0, 3, 1, 2)
    if tensor.ndim == 3 and tensor.shape[1] - height * width in (0, prefix):  # some add the class token late
        return tensor[:, -height * width:].transpose(1, 2).unflatten(2, size)
    return None


def _place(evidence: np.ndarray, box: Box, size: Tuple[int, int]) -> np.ndarray:
    """Scale a map, h x w, that covers `box` of a picture to the picture: float32, H x W, 0 outside the box."""
    left, top, right, bottom = box
    height, width = evidence.shape
    x, y = width / (right - left), height / (bottom - top)
    return np.asarray(Image.fromarray(evidence.astype(np.float32)).transform(
        size, Image.Transform.AFFINE, (x, 0, -left * x, 0, y, -top * y), Image.Resampling.BILINEAR))
