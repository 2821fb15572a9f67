"""How good a classifier is: accuracy with its uncertainty, calibration, each class, and under corruption."""
import math
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vishub.errors import InputError, import_extra
from vishub.tasks.classification.data import ImageSet

__all__ = [
    'CORRUPTIONS', 'class_report', 'classification_metrics', 'corrupt', 'plot_robustness', 'predict_logits',
    'robustness', 'to_input', 'wilson_interval',
]

SEVERITIES = (1, 2, 3, 4, 5)
# The strength of each corruption at severities 1 to 5.
CORRUPTIONS: Dict[str, Tuple[float, ...]] = {
    'noise': (0.04, 0.08, 0.12, 0.16, 0.20),  # standard deviation of Gaussian noise; image values 0 to 1
    'blur': (0.016, 0.024, 0.032, 0.044, 0.056),  # standard deviation of a Gaussian blur, as a share of the side
    'contrast': (0.7, 0.5, 0.35, 0.25, 0.15),  # factor on the distance from the image's mean
    'occlusion': (0.05, 0.10, 0.20, 0.30, 0.40),  # share of the area under one grey square
}


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


def image_batches(
        images: ImageSet, side: int, batch_size: int) -> Iterator[torch.Tensor]:
    """uint8 batches `(B, C, H, W)`; files are resized to `side` one by one."""
    total = len(images)
    for start in range(0, total, batch_size):
        tensors = []
        for index in range(start, min(start + batch_size, total)):
            image = torch.from_numpy(np.ascontiguousarray(images[index].transpose(2, 0, 1)))
            if images.native_side is None:
                image = F.interpolate(
                    image[None].float(), size=(side, side), mode='bicubic', antialias=True)[0].clamp(0, 255).byte()
            tensors.append(image)
        yield torch.stack(tensors)


@torch.inference_mode()
def predict_logits(
        model: nn.Module,
        images: ImageSet,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int = 250,
        device: Optional[torch.device] = None,
        corruption: Optional[Tuple[str, int]] = None,
        seed: int = 0,
) -> torch.Tensor:
    """Logits of a model on images, float32 `(N, num_classes)` on the CPU.

    Args:
        model: Classifier; put in eval mode.
        images: The images.
        side: Side in pixels that they are resized to.
        mean: Mean of each channel, for values 0 to 1.
        std: Standard deviation of each channel.
        batch_size: Images a forward pass.
        device: Where the model is; its first parameter's device by default.
        corruption: (name, severity 1 to 5) applied to the images as stored, before resizing.
        seed: Seed of the corruption.
    """
    model.eval()
    device = device or next(model.parameters()).device
    logits = []
    for number, batch in enumerate(image_batches(images, side, batch_size)):
        batch = batch.to(device)
        if corruption is not None:
            batch = corrupt(batch, *corruption, seed=seed * 1_000_003 + number)
        logits.append(model(to_input(batch, side, mean, std)).float().cpu())
    return torch.cat(logits)


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> Tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95 % by default.

    Args:
        correct: Hits, 0 to `total`.
        total: Trials, at least 1.
        z: Quantile of the normal distribution.

    Returns:
        (low, high), both 0 to 1.
    """
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0., (centre - spread) / scale), min(1., (centre + spread) / scale)


def classification_metrics(logits: torch.Tensor, labels: Sequence[int]) -> Dict[str, Any]:
    """Accuracy and calibration.

    Args:
        logits: float `(N, K)`.
        labels: N class indices, 0 to K - 1.

    Returns:
        `top1` and `top5` (per cent; `top5` only for more than five classes), `top1_ci95` (Wilson's interval, per
        cent), `ece` (expected calibration error over 15 bins of confidence, 0 to 1, Guo et al. 2017), `nll` (mean
        cross entropy).
    """
    import_extra('torchmetrics', 'train')
    from torchmetrics.functional.classification import multiclass_calibration_error
    target = torch.as_tensor(np.asarray(labels), dtype=torch.long)
    correct = int((logits.argmax(1) == target).sum())
    metrics: Dict[str, Any] = {
        'top1': 100 * correct / len(target),
        'top1_ci95': [round(100 * bound, 2) for bound in wilson_interval(correct, len(target))],
    }
    if logits.shape[1] > 5:
        metrics['top5'] = 100 * float((logits.topk(5, dim=1).indices == target[:, None]).any(1).float().mean())
    probabilities = logits.softmax(1)
    metrics['ece'] = float(multiclass_calibration_error(probabilities, target, num_classes=logits.shape[1], n_bins=15))
    metrics['nll'] = float(F.cross_entropy(logits, target))
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in metrics.items()}


def class_report(logits: torch.Tensor, labels: Sequence[int], classes: Sequence[str]) -> Dict[str, Any]:
    """Precision, recall, F1 and support of each class, and the confusion matrix.

    Args:
        logits: float `(N, K)`.
        labels: N class indices.
        classes: K names.

    Returns:
        `classes`: `{name: {precision, recall, f1, support}}` (0 where a class was never predicted or never there);
        `confusion`: K x K counts, rows are the true class, columns the predicted one.
    """
    import_extra('torchmetrics', 'train')
    from torchmetrics.functional.classification import multiclass_confusion_matrix
    target = torch.as_tensor(np.asarray(labels), dtype=torch.long)
    confusion = multiclass_confusion_matrix(logits.argmax(1), target, num_classes=len(classes))
    report = {}
    for index, name in enumerate(classes):
        hits = int(confusion[index, index])
        support, predicted = int(confusion[index].sum()), int(confusion[:, index].sum())
        precision, recall = hits / max(predicted, 1), hits / max(support, 1)
        report[name] = {
            'precision': round(precision, 4), 'recall': round(recall, 4),
            'f1': round(2 * precision * recall / max(precision + recall, 1e-12), 4), 'support': support,
        }
    return {'classes': report, 'confusion': confusion.tolist()}


# -- robustness -------------------------------------------------------------------------------------------------------

def corrupt(images: torch.Tensor, kind: str, severity: int, seed: int = 0) -> torch.Tensor:
    """Corrupt a batch, deterministically.

    Args:
        images: uint8 `(B, C, H, W)`.
        kind: `noise`, `blur`, `contrast` or `occlusion` (see `CORRUPTIONS` for their strengths).
        severity: 1 to 5.
        seed: Seed of the noise and of the occluder's place.

    Returns:
        uint8 `(B, C, H, W)`.
    """
    if kind not in CORRUPTIONS or severity not in SEVERITIES:
        raise InputError(f"corruption '{kind}' at severity {severity}; choose {', '.join(CORRUPTIONS)} at 1 to 5")
    strength = CORRUPTIONS[kind][severity - 1]
    batch, _, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    x = images.float() / 255
    if kind == 'noise':
        x = x + strength * torch.randn(x.shape, generator=generator).to(x.device)
    elif kind == 'blur':
        from torchvision.transforms.v2.functional import gaussian_blur
        sigma = strength * min(height, width)
        kernel = min(2 * math.ceil(3 * sigma) + 1, 2 * (min(height, width) // 2) - 1)
        x = gaussian_blur(x, [kernel, kernel], [sigma, sigma])
    elif kind == 'contrast':
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = mean + strength * (x - mean)
    else:
        side_y, side_x = round(height * strength ** 0.5), round(width * strength ** 0.5)
        top = torch.randint(0, height - side_y + 1, (batch,), generator=generator)
        left = torch.randint(0, width - side_x + 1, (batch,), generator=generator)
        x = x.clone()
        for index in range(batch):
            x[index, :, top[index]:top[index] + side_y, left[index]:left[index] + side_x] = 0.5
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def robustness(
        model: nn.Module,
        images: ImageSet,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        count: Optional[int] = None,
        batch_size: int = 250,
        seed: int = 0,
) -> Dict[str, Any]:
    """Top-1 accuracy in per cent under each corruption at five severities.

    Args:
        model: Classifier.
        images: Test images, corrupted as stored and then resized to `side`.
        side: Input side in pixels.
        mean: Mean of each channel, for values 0 to 1.
        std: Standard deviation of each channel.
        count: Only so many images, evenly spread over the set (which may be sorted by class).
        batch_size: Images a forward pass.
        seed: Seed of the corruptions: two models see the same corrupted images.

    Returns:
        `{'num_images': N, 'clean': top1, 'noise': [five of top1], 'blur': …, 'contrast': …, 'occlusion': …}`.
    """
    if count is not None and count < len(images):
        images = images.take(np.linspace(0, len(images) - 1, count).astype(int))
    labels = torch.from_numpy(images.labels)

    def accuracy(corruption: Optional[Tuple[str, int]]) -> float:
        logits = predict_logits(
            model, images, side, mean, std, batch_size=batch_size, corruption=corruption, seed=seed)
        return round(100 * float((logits.argmax(1) == labels).double().mean()), 2)

    table: Dict[str, Any] = {'num_images': len(labels), 'clean': accuracy(None)}
    for kind in CORRUPTIONS:
        table[kind] = [accuracy((kind, severity)) for severity in SEVERITIES]
    return table


def plot_robustness(tables: Dict[str, Dict[str, Any]], path: Any) -> None:
    """Draw `robustness` tables of one or more models, one panel a corruption, and save the picture.

    Args:
        tables: `{model name: table}`.
        path: Picture file; its suffix tells the format.
    """
    import_extra('matplotlib', 'train')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vishub.files import atomic_path
    figure = Figure(figsize=(3 * len(CORRUPTIONS), 3.2), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(CORRUPTIONS), sharey=True)
    for axis, kind in zip(axes, CORRUPTIONS):
        for name, table in tables.items():
            axis.plot((0, *SEVERITIES), [table['clean'], *table[kind]], marker='o', label=name)
        axis.set(title=kind, xlabel='severity (0 is clean)', xticks=(0, *SEVERITIES))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel='top-1 accuracy, %')
    axes[0].legend(fontsize='small')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
