"""How good a classifier is: accuracy with its uncertainty, calibration, each class, and under corruption.

`evaluate` measures models as users meet them: named, and fed by the pipeline's own preparation of pictures.
"""
import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.hub.find import weights_folder
from vishub.tasks.base import Progress
from vishub.tasks.classification.data import ImageData, ImageSet, Indices
from vishub.tasks.classification.pipeline import ClassificationPipeline
from vishub.tasks.evaluation import card_for, into_card, recorded, write_report

__all__ = [
    'CORRUPTIONS', 'SEVERITIES', 'class_order', 'class_report', 'classification_metrics', 'corrupt', 'evaluate',
    'calibration_bins', 'measure', 'model_input', 'new_figure', 'plot_calibration', 'plot_confusion', 'plot_robustness',
    'predict_logits', 'robustness',
    'save_evaluation', 'update_card', 'wilson_interval',
]

SEVERITIES = (0, 1, 2, 3, 4, 5)
# The strength of each corruption at severities 1 to 5; severity 0 is the clean image.
CORRUPTIONS: Dict[str, Tuple[float, ...]] = {
    'noise': (0.04, 0.08, 0.12, 0.16, 0.20),  # standard deviation of Gaussian noise; image values 0 to 1
    'blur': (0.016, 0.024, 0.032, 0.044, 0.056),  # standard deviation of a Gaussian blur, as a share of the side
    'contrast': (0.7, 0.5, 0.35, 0.25, 0.15),  # factor on the distance from the image's mean
    'occlusion': (0.05, 0.10, 0.20, 0.30, 0.40),  # share of the area under one grey square
}

# uint8 images (C, H, W), one after the other since files may be large -> the model's input (B, C, H, W)
Prepare = Callable[[Iterator[torch.Tensor]], torch.Tensor]


# -- accuracy and calibration -----------------------------------------------------------------------------------------

@torch.inference_mode()
def predict_logits(
        model: nn.Module,
        images: ImageSet,
        prepare: Prepare,
        *,
        batch_size: int = 250,
        device: Optional[torch.device] = None,
        corruption: Tuple[str, int] = ('noise', 0),
        seed: int = 0,
        advance: Optional[Callable[[int], None]] = None,
) -> torch.Tensor:
    """Logits of a model on images, float32 `(N, num_classes)` on the CPU.

    Args:
        model: Classifier; put in eval mode.
        images: The images.
        prepare: Turns uint8 images `(C, H, W)`, given one by one, into the model's input.
        batch_size: Images a forward pass.
        device: Where the model is; its first parameter's device by default.
        corruption: (name, severity 0 to 5) applied to the images as stored, before they are prepared.
        seed: Seed of the corruption; what happens to an image depends on it and the image's index alone.
        advance: Called with the number of images of each batch that is done.
    """
    model.eval()
    device = device or next(model.parameters()).device

    def image(index: int) -> torch.Tensor:
        clean = torch.from_numpy(np.ascontiguousarray(images[index].transpose(2, 0, 1)))
        return corrupt(clean, *corruption, seed=(seed, index))

    logits = []
    for start in range(0, len(images), batch_size):
        batch = prepare(image(index) for index in range(start, min(start + batch_size, len(images))))
        logits.append(model(batch.to(device)).float().cpu())
        if advance is not None:
            advance(len(batch))
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


def classification_metrics(logits: torch.Tensor, labels: Indices) -> Dict[str, Any]:
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


def class_report(logits: torch.Tensor, labels: Indices, classes: Sequence[str]) -> Dict[str, Any]:
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


def calibration_bins(logits: torch.Tensor, labels: Indices, bins: int = 15) -> List[Dict[str, Any]]:
    """Confidence and accuracy by bins of confidence: the reliability diagram of Guo et al. 2017 (arXiv:1706.04599).

    Args:
        logits: float `(N, K)`.
        labels: N class indices.
        bins: Number of bins of equal width over 0 to 1; a bin holds its upper end.

    Returns:
        A dictionary a bin: `low`, `high` (its ends), `count`, and `confidence`, `accuracy` (means, 0 to 1; None in an
        empty bin). Their count-weighted mean distance is the `ece` of `classification_metrics`.
    """
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == torch.as_tensor(np.asarray(labels), dtype=torch.long)).double()
    edges = torch.linspace(0, 1, bins + 1)
    place = torch.bucketize(confidence, edges[1:-1])
    table = []
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        table.append({
            'low': round(float(edges[number]), 5), 'high': round(float(edges[number + 1]), 5), 'count': count,
            'confidence': round(float(confidence[inside].double().mean()), 5) if count else None,
            'accuracy': round(float(right[inside].mean()), 5) if count else None,
        })
    return table


# -- robustness -------------------------------------------------------------------------------------------------------

def corrupt(image: torch.Tensor, kind: str, severity: int, seed: Sequence[int] = (0,)) -> torch.Tensor:
    """Corrupt an image, deterministically.

    Args:
        image: uint8 `(C, H, W)`.
        kind: `noise`, `blur`, `contrast` or `occlusion` (see `CORRUPTIONS` for their strengths).
        severity: 0 (unchanged) to 5.
        seed: Whole numbers that decide the noise and the occluder's place. The same seed gives the same noise,
            scaled, at all severities.

    Returns:
        uint8 `(C, H, W)`.

    Raises:
        InputError: If there is no such corruption or severity.
    """
    if kind not in CORRUPTIONS or severity not in SEVERITIES:
        raise InputError(f"corruption '{kind}' at severity {severity}; choose {', '.join(CORRUPTIONS)} at 0 to 5")
    if severity == 0:
        return image
    strength = CORRUPTIONS[kind][severity - 1]
    _, height, width = image.shape
    generator = np.random.default_rng(list(seed))
    x = image.float() / 255
    if kind == 'noise':
        x = x + strength * torch.from_numpy(generator.standard_normal(x.shape, dtype=np.float32))
    elif kind == 'blur':
        from torchvision.transforms.v2.functional import gaussian_blur
        side = min(height, width)
        kernel = max(1, min(2 * math.ceil(3 * strength * side) + 1, 2 * (side // 2) - 1))
        x = gaussian_blur(x, [kernel, kernel], [strength * side, strength * side])
    elif kind == 'contrast':
        x = x.mean() + strength * (x - x.mean())
    else:
        rows, columns = round(height * strength ** 0.5), round(width * strength ** 0.5)
        top, left = generator.integers(0, height - rows + 1), generator.integers(0, width - columns + 1)
        x[:, top:top + rows, left:left + columns] = 0.5
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def robustness(
        pipe: ClassificationPipeline,
        images: ImageSet,
        classes: Sequence[str],
        *,
        batch_size: int = 250,
        seed: int = 0,
        advance: Optional[Callable[[int], None]] = None,
) -> Dict[str, List[float]]:
    """Top-1 accuracy in per cent under each corruption at severities 0 (clean) to 5.

    Args:
        pipe: The model with its preparation of pictures.
        images: Test images, corrupted as stored.
        classes: Class names, in the order of the labels.
        batch_size: Images a forward pass.
        seed: Seed of the corruptions: two models see the same corrupted images.
        advance: See `predict_logits`.

    Returns:
        `{'noise': [six numbers], 'blur': …, 'contrast': …, 'occlusion': …}`.
    """
    def accuracy(kind: str, severity: int) -> float:
        logits = _logits(
            pipe, images, classes, batch_size=batch_size, corruption=(kind, severity), seed=seed, advance=advance)
        return round(100 * float((logits.argmax(1).numpy() == images.labels).mean()), 2)

    clean = accuracy('noise', 0)
    return {kind: [clean, *(accuracy(kind, severity) for severity in SEVERITIES[1:])] for kind in CORRUPTIONS}


# -- models by name ---------------------------------------------------------------------------------------------------

def model_input(pipe: ClassificationPipeline, pictures: Iterable[np.ndarray]) -> torch.Tensor:
    """uint8 pictures `(H, W, C)` of 1 or 3 channels -> what the pipeline's model gets, `(B, C, H, W)` on the CPU."""
    mode = 'L' if pipe.input_size[0] == 1 else 'RGB'
    return torch.stack([
        pipe.transform(Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p).convert(mode)) for p in pictures])


def _logits(pipe: ClassificationPipeline, images: ImageSet, classes: Sequence[str], **options: Any) -> torch.Tensor:
    """Logits `(N, K)` of the pipeline's model, in the order of `classes`."""
    order = class_order(pipe, classes)

    def prepare(batch: Iterator[torch.Tensor]) -> torch.Tensor:
        return model_input(pipe, (image.numpy().transpose(1, 2, 0) for image in batch))

    logits = predict_logits(pipe.model, images, prepare, device=pipe.device, **options)
    if not logits.isfinite().all():
        raise InputError(f"'{pipe.name}' gave scores that are not finite: its weights are damaged")
    return logits[:, order]


def class_order(pipe: ClassificationPipeline, classes: Sequence[str]) -> List[int]:
    """The model's output index of each class: by name, or by place where the model names none of them."""
    if pipe.num_classes != len(classes):
        raise InputError(f"'{pipe.name}' tells {pipe.num_classes} classes apart, the data have {len(classes)}")
    names = pipe.label_names
    if names is None or set(names).isdisjoint(classes):
        return list(range(len(classes)))
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise InputError(f"'{pipe.name}' does not know the class '{unknown[0]}'; it knows {', '.join(names)}")
    return [names.index(name) for name in classes]


def measure(
        pipe: ClassificationPipeline,
        images: ImageSet,
        classes: Sequence[str],
        *,
        batch_size: int = 250,
        advance: Optional[Callable[[int], None]] = None,
) -> Dict[str, Any]:
    """Accuracy, calibration and per-class report of a pipeline's model.

    Args:
        pipe: The model with its preparation of pictures.
        images: Images with labels.
        classes: Class names, in the order of the labels.
        batch_size: Images a forward pass.
        advance: See `predict_logits`.

    Returns:
        `num_test` (images), `metrics` (see `classification_metrics`), `report` (see `class_report`) with
        `calibration` (see `calibration_bins`).

    Raises:
        InputError: If the model has other classes, or scores that are not finite.
    """
    logits = _logits(pipe, images, classes, batch_size=batch_size, advance=advance)
    return {
        'num_test': len(images),
        'metrics': classification_metrics(logits, images.labels),
        'report': {
            **class_report(logits, images.labels, classes), 'calibration': calibration_bins(logits, images.labels)},
    }


def evaluate(
        models: Sequence[str],
        data: ImageData,
        *,
        split: str = 'test',
        robustness_images: int = 0,
        batch_size: int = 250,
        seed: int = 0,
        device: Optional[str] = None,
        progress: Optional[Progress] = None,
) -> Dict[str, Any]:
    """Measure a model, and its peers on the same images.

    Args:
        models: Names that `ClassificationPipeline` takes, or folders of weights; the first is the model, the others
            are its peers.
        data: Data with the split.
        split: `test` or `val`.
        robustness_images: Also measure robustness, on at most so many evenly spread images of the split (which may be
            sorted by class); 0 does not.
        batch_size: Images a forward pass.
        seed: Seed of the corruptions.
        device: See `ClassificationPipeline`.
        progress: Called with (images done, images in all), those of every corruption counted.

    Returns:
        JSON values: `model`, `num_params`, `input_size`, `data`, `split`, `num_test`, `metrics`, `report`, `peers`, and
        `robustness` if asked for; the last five as metrics.json has them (`vishub/hub/folder.py`).

    Raises:
        InputError: If the data have no such split, or a model other classes.
    """
    if split not in ('test', 'val'):
        raise InputError(f"split is '{split}'; it is test or val")
    images = data.test if split == 'test' else data.val
    if images is None:
        raise InputError(f'{data.name} has no {split} split')
    sources = [weights_folder(model) or model for model in models]
    if len(set(sources)) < len(sources):
        raise InputError(f'of {", ".join(models)} two are the same')
    pipes: Dict[str, Tuple[ClassificationPipeline, Optional[Path]]] = {}
    for model in models:
        folder = weights_folder(model)
        pipe = ClassificationPipeline(f'local-dir:{folder}' if folder else model, device)
        class_order(pipe, data.classes)  # fails before anything is measured
        name = _display_name(model, folder, is_peer=bool(pipes))
        if name in pipes:
            raise InputError(f"two models are called '{name}': rename the folder of one")
        pipes[name] = pipe, folder

    some = images
    if robustness_images and robustness_images < len(images):
        some = images.take(np.linspace(0, len(images) - 1, robustness_images).astype(int))
    passes = 1 + len(CORRUPTIONS) * (len(SEVERITIES) - 1) if robustness_images else 0
    total, done = len(pipes) * (len(images) + passes * len(some)), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    measured: List[Dict[str, Any]] = []
    tables: Dict[str, Dict[str, List[float]]] = {}
    for name, (pipe, folder) in pipes.items():
        figures = measure(pipe, images, data.classes, batch_size=batch_size, advance=advance)
        training = recorded(folder).get('training', {})
        budget = {key: training[key] for key in ('wall_s', 'epochs') if key in training}
        size = {'num_params': pipe.num_params, 'input_size': list(pipe.input_size)}
        measured.append({'name': name, **size, **figures, **budget})
        if robustness_images:
            tables[name] = robustness(
                pipe, some, data.classes, batch_size=batch_size, seed=seed, advance=advance)
    own, *peers = measured
    report = {
        'model': own['name'], 'num_params': own['num_params'], 'input_size': own['input_size'], 'data': data.name,
        'split': 'test split' if split == 'test' else 'validation split',
        **{key: own[key] for key in ('num_test', 'metrics', 'report')},
        'peers': [{key: value for key, value in peer.items() if key not in ('num_test', 'report')} for peer in peers],
    }
    if robustness_images:
        report['robustness'] = {
            'metric': 'top1', 'severities': list(SEVERITIES), 'num_images': len(some), 'seed': seed, 'models': tables}
    return report


def _display_name(model: str, folder: Optional[Path], is_peer: bool) -> str:
    """The name of the weights; a peer whose sizes were changed is not to pass for the published architecture."""
    if folder is None:
        return model.removeprefix('vishub/')
    name = folder.resolve().name
    arguments = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('model_args', {})
    changed = [f'{key}={value}' for key, value in arguments.items() if key not in ('in_chans', 'num_classes')]
    return f'{name} with {", ".join(changed)}' if is_peer and changed else name


# -- report and card --------------------------------------------------------------------------------------------------

def save_evaluation(report: Mapping[str, Any], folder: Union[str, Path]) -> List[Path]:
    """Write what `evaluate` found: evaluation.json, confusion.png, calibration.png, robustness.png if measured.

    Returns:
        The files.
    """
    folder = Path(folder)
    files = [write_report(report, folder), folder / 'confusion.png', folder / 'calibration.png']
    plot_confusion(report['report']['confusion'], list(report['report']['classes']), files[1])
    plot_calibration(report['report']['calibration'], report['metrics']['ece'], files[2])
    if 'robustness' in report:
        files.append(folder / 'robustness.png')
        plot_robustness(report['robustness'], files[-1])
    return files


def update_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into a weights folder's metrics.json and README.md; its weights stay as they are.

    Raises:
        InputError: If the figures are not of the test split of the data that the weights were trained on.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    known = card_for(folder, report)
    if report['split'] not in ('test split', known.get('split')):
        raise InputError(f"a card has figures of the test split, not of the {report['split']}")
    card = None
    if 'robustness' in report:
        plot_robustness(report['robustness'], folder / 'robustness.png')
        card = {**known.get('card', {}), 'robustness_plot': 'robustness.png'}
    into_card(folder, report, card)


def plot_robustness(measured: Mapping[str, Any], path: Union[str, Path]) -> None:
    """Draw the entry `robustness` of a report, one panel a corruption and one line a model, and save the picture.

    Args:
        measured: `{'severities': [0, …], 'models': {name: {corruption: [one number a severity]}}, …}`.
        path: Picture file; its suffix tells the format.
    """
    figure = new_figure(12, 3.4)
    kinds = list(next(iter(measured['models'].values())))
    axes = figure.subplots(1, len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds):
        for name, table in measured['models'].items():
            axis.plot(measured['severities'], table[kind], marker='o', label=name)
        axis.set(title=kind, xlabel='severity (0 is clean)', xticks=measured['severities'])
        axis.grid(alpha=0.3)
    axes[0].set(ylabel='top-1 accuracy, %')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize='small')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Union[str, Path]) -> None:
    """Draw a confusion matrix (rows are the true class, shares of each row as shades) and save the picture.

    Args:
        confusion: K x K counts.
        classes: K names.
        path: Picture file; its suffix tells the format.
    """
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.35 * len(classes), 20)
    figure = new_figure(side, side)
    axis = figure.subplots()
    axis.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    axis.set(xlabel='predicted', ylabel='true')
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:  # more numbers than that cannot be read
        for (row, column), count in np.ndenumerate(counts):
            colour = 'white' if shares[row, column] > 0.5 else 'black'
            axis.text(column, row, str(count), ha='center', va='center', fontsize='x-small', color=colour)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_calibration(table: Sequence[Mapping[str, Any]], ece: float, path: Union[str, Path]) -> None:
    """Draw accuracy over confidence, and below how many images have which confidence, and save the picture.

    Args:
        table: What `calibration_bins` gives.
        ece: Expected calibration error, 0 to 1, for the title.
        path: Picture file; its suffix tells the format.
    """
    figure = new_figure(5, 6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    lows, widths = [row['low'] for row in table], [row['high'] - row['low'] for row in table]
    above.bar(lows, [row['accuracy'] or 0 for row in table], widths, align='edge', edgecolor='white', label='accuracy')
    filled = [row for row in table if row['count']]
    above.plot(
        [row['confidence'] for row in filled], [row['accuracy'] for row in filled], 'o', color='black', markersize=3,
        label='mean of the bin')
    above.plot([0, 1], [0, 1], '--', color='grey', label='perfect')
    above.set(ylabel='accuracy', ylim=(0, 1), xlim=(0, 1), title=f'expected calibration error {ece:.4f}')
    above.legend(loc='upper left', fontsize='small')
    below.bar(lows, [row['count'] for row in table], widths, align='edge', edgecolor='white')
    below.set(xlabel='confidence', ylabel='images')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def new_figure(width: float, height: float) -> Any:
    """A figure in inches that needs no display."""
    import_extra('matplotlib', 'train')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure
