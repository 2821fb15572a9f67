"""How well masks fit the truth: Dice, the 95 % Hausdorff distance, and the normalised surface Dice.

Classes that are missing, by one rule each:

* Dice: a class that neither mask nor truth has is left out; one that only one of them has counts 0.
* Hausdorff distance: left out where either lacks the class, for there is no distance to nothing. How often that
  happened is in the report (`hd95_missing`).
* Surface Dice: as Dice.

A volume's figure is the mean over its foreground classes that are measured, a data set's the mean over its volumes.
"""
import itertools
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import nn

from vishub.errors import InputError, import_extra
from vishub.tasks.base import Progress
from vishub.tasks.evaluation import budget, into_card, open_models, write_report
from vishub.tasks.volume_segmentation.data import CaseSet, VolumeData, load_data
from vishub.tasks.volume_segmentation.pipeline import VolumeSegmentationPipeline

__all__ = [
    'NSD_TOLERANCE_MM', 'best_thresholds', 'dice_of_classes', 'draw_pictures', 'evaluate', 'measure_case',
    'save_evaluation', 'surface_figures', 'update_card',
]

NSD_TOLERANCE_MM = 1.0
_RULES = (
    'Dice and surface Dice: classes in neither are left out, in one alone count 0; Hausdorff: left out unless in both. '
    f'Surface Dice at {NSD_TOLERANCE_MM:g} mm; distances in mm.')
_THRESHOLDS = 'best thresholds'


def dice_of_classes(found: np.ndarray, truth: np.ndarray, num_classes: int) -> List[Optional[float]]:
    """Dice of each foreground class, 0 to 1: twice the common voxels over the sum of both.

    A class that neither has gives None (there is nothing to measure); one that only one of them has gives 0.

    Args:
        found, truth: Labels (D, H, W), whole numbers.
        num_classes: K, with the background.
    """
    values: List[Optional[float]] = []
    for kind in range(1, num_classes):
        a, b = found == kind, truth == kind
        total = int(a.sum()) + int(b.sum())
        values.append(2 * int((a & b).sum()) / total if total else None)
    return values


def surface_figures(
        found: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> Tuple[Optional[float], Optional[float]]:
    """Distances between the surfaces of one class, by MONAI.

    Args:
        found, truth: Where the class is, bool (D, H, W).
        spacing: Millimetres along D, H, W.

    Returns:
        95 % Hausdorff distance in mm (None unless both have the class), and surface Dice at `NSD_TOLERANCE_MM` (None if
        neither has it, 0 if one alone).
    """
    if not found.any() and not truth.any():
        return None, None
    if not (found.any() and truth.any()):
        return None, 0.
    metrics = import_extra('monai.metrics', 'medical')
    both = found | truth
    box = []
    for axis in range(3):  # what is far from either costs time and changes nothing
        places = np.flatnonzero(both.any(tuple(a for a in range(3) if a != axis)))
        box.append(slice(max(int(places[0]) - 1, 0), int(places[-1]) + 2))
    millimetres = [float(length) for length in spacing]
    a, b = (torch.from_numpy(mask[tuple(box)])[None, None].float() for mask in (found, truth))
    distance = metrics.compute_hausdorff_distance(
        a, b, include_background=True, percentile=95, spacing=millimetres)
    surface = metrics.compute_surface_dice(
        a, b, class_thresholds=[NSD_TOLERANCE_MM], include_background=True, spacing=millimetres)
    return float(distance), float(surface)


def measure_case(
        found: np.ndarray, truth: np.ndarray, spacing: Sequence[float], labels: Sequence[str],
) -> Dict[str, Dict[str, Optional[float]]]:
    """Figures of one volume: class -> `dice`, `hd95` (mm), `nsd`; None where the rules above leave it out.

    Raises:
        InputError: If the two are not of one shape.
    """
    if found.shape != truth.shape:
        raise InputError(f'the mask has shape {found.shape}, the truth {truth.shape}: they must be the same')
    figures = {}
    for kind, (name, dice) in enumerate(zip(labels[1:], dice_of_classes(found, truth, len(labels))), 1):
        distance, surface = surface_figures(found == kind, truth == kind, spacing)
        figures[name] = {'dice': dice, 'hd95': distance, 'nsd': surface}
    return figures


def best_thresholds(cases: CaseSet, num_classes: int, limit: int = 4) -> Tuple[float, ...]:
    """Thresholds of the first channel's normalised values that part the classes best by Dice, brighter ones higher.

    What a network has to beat. All rising tuples of 40 values, evenly spread, are tried on the first `limit` cases.

    Raises:
        InputError: If there are more than three classes: there would be too many tuples.
    """
    if num_classes > 3:
        raise InputError(f'{num_classes} classes are too many to try all thresholds: at most 3')
    chosen = [cases[index] for index in range(min(limit, len(cases)))]
    values = np.concatenate([case.image[0].ravel()[::7] for case in chosen])
    low, high = np.quantile(values, (0.01, 0.9995))
    grid = np.linspace(low, high, 40)
    # voxels of each case by class and by how many values they are above: all that Dice needs
    counts = np.stack([
        np.bincount(
            case.label.ravel() * 41 + np.digitize(case.image[0].ravel(), grid), minlength=41 * num_classes,
        ).reshape(num_classes, 41) for case in chosen])  # cases, classes, bins
    best: Tuple[float, Tuple[int, ...]] = (-1., tuple(range(num_classes - 1)))
    for places in itertools.combinations(range(40), num_classes - 1):
        edges = [0, *(place + 1 for place in places), 41]
        scores = []
        for kind in range(1, num_classes):
            inside = counts[:, :, edges[kind]:edges[kind + 1]].sum(2)  # cases, true classes
            scores.append(2 * inside[:, kind] / np.maximum(inside.sum(1) + counts[:, kind].sum(1), 1))
        best = max(best, (float(np.mean(scores)), places))
    return tuple(float(grid[place]) for place in best[1])


# (what `CaseSet.source` gives first, number of the case) -> labels (D, H, W)
Segmenter = Callable[[Any, int], np.ndarray]


def measure(
        segment: Segmenter, cases: CaseSet, labels: Sequence[str], count: int,
        advance: Optional[Callable[[], None]] = None) -> Dict[str, Any]:
    """Figures of one segmenter on the first `count` cases.

    Returns:
        `num_test`, `metrics` (`dice`, `dice_ci95`, `hd95`, `nsd`, and `dice_<class>` of each), `report` with each
        case's figures and the rules.
    """
    rows: List[Dict[str, Any]] = []
    for index in range(count):
        source, truth, spacing = cases.source(index)
        rows.append({'name': cases.name(index), 'classes': measure_case(
            segment(source, index), truth, spacing, labels)})
        if advance is not None:
            advance()
    metrics: Dict[str, Any] = {}
    for key in ('dice', 'hd95', 'nsd'):
        of_cases = [_mean([figures[key] for figures in row['classes'].values()]) for row in rows]
        mean = _mean(of_cases)
        metrics[key] = None if mean is None else round(mean, 4)
        known = [value for value in of_cases if value is not None]
        if key == 'dice' and len(known) > 1:
            half = 1.96 * float(np.std(known, ddof=1)) / len(known) ** 0.5
            metrics['dice_ci95'] = [round(float(np.mean(known)) - half, 4), round(float(np.mean(known)) + half, 4)]
    for name in labels[1:]:
        mean = _mean([row['classes'][name]['dice'] for row in rows])
        metrics[f'dice_{name}'] = None if mean is None else round(mean, 4)
    missing = sum(figures['hd95'] is None for row in rows for figures in row['classes'].values())
    metrics = {key: value for key, value in metrics.items() if value is not None}
    return {'num_test': count, 'metrics': metrics, 'report': {'cases': rows, 'hd95_missing': missing, 'rules': _RULES}}


def _mean(values: Sequence[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def evaluate(
        models: Sequence[Union[str, nn.Module]],
        data: Union[str, Path, VolumeData],
        *,
        limit: Optional[int] = None,
        batch_size: int = 4,
        seed: int = 0,
        device: Optional[str] = None,
        progress: Optional[Progress] = None,
) -> Dict[str, Any]:
    """Measure a model, its peers, and thresholds (where there are at most three classes) on the same test volumes.

    All that a user's scan goes through is gone through: masks are compared on the scans' own voxels.

    Args:
        models: Names that `VolumeSegmentationPipeline` takes, folders of weights, or modules; the first is the model,
            the others its peers, which must know the same classes.
        data: For `load_data`, or data already read.
        limit: Measure at most so many volumes.
        batch_size: Windows a forward pass.
        seed: Of made training volumes, by which thresholds are chosen: test volumes are the same for every seed.
        device: See `VolumeSegmentationPipeline`.
        progress: Called with (volumes done, volumes in all).

    Returns:
        JSON values: `model`, `num_params`, `data`, `split`, `num_test`, `metrics`, `report` (see `measure`), and
        `peers`, a list of {`name`, `num_params`, `metrics`}.

    Raises:
        InputError: If the data have no test split, or two models are the same or know other classes.
    """
    pipes, known = open_models(VolumeSegmentationPipeline, models, device)
    own, *_ = pipes
    first = pipes[own]
    if not isinstance(data, VolumeData):
        data = load_data(data, preprocessing=first.preprocessing, seed=seed)
    cases = data.test
    if cases is None or not len(cases):
        raise InputError(f'{data.name} has no test split')
    for name, pipe in pipes.items():
        if len(pipe.label_names) != len(data.labels) or pipe.in_chans != len(data.channels):
            raise InputError(
                f"'{name}' takes {pipe.in_chans} channels and knows {len(pipe.label_names)} classes; {data.name} has "
                f'{len(data.channels)} and {len(data.labels)}')

    count = len(cases) if limit is None else min(limit, len(cases))
    thresholds = () if len(data.labels) > 3 or data.train is None else best_thresholds(data.train, len(data.labels))
    total, done = count * (len(pipes) + bool(thresholds)), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def masks(pipe: VolumeSegmentationPipeline) -> Segmenter:
        return lambda source, _: pipe(source, batch_size=batch_size).mask  # type: ignore[union-attr]

    def thresholded(source: Any, index: int) -> np.ndarray:
        values = source if isinstance(source, np.ndarray) else source.data[0]
        assert data.preprocessing is not None
        return np.digitize(data.preprocessing.normalise(values[None])[0], thresholds)

    segmenters: Dict[str, Segmenter] = {name: masks(pipe) for name, pipe in pipes.items()}
    if thresholds:
        segmenters[_THRESHOLDS] = thresholded
    rows = []
    for name, segment in segmenters.items():
        figures = measure(segment, cases, data.labels, count, advance)
        rows.append({
            'name': name, 'num_params': pipes[name].num_params if name in pipes else 0, **figures,
            **(budget(known[name]) if name in pipes else {'epochs': 0})})
    return {
        'model': own, 'num_params': first.num_params, 'data': data.name,
        'split': f'test split, {data.split}' if data.split else 'test split',
        **{key: rows[0][key] for key in ('num_test', 'metrics', 'report')},
        'peers': [{key: value for key, value in row.items() if key not in ('num_test', 'report')} for row in rows[1:]],
    }


def save_evaluation(report: Mapping[str, Any], folder: Union[str, Path]) -> List[Path]:
    """Write what `evaluate` found as evaluation.json.

    Returns:
        The files.
    """
    return [write_report(report, folder)]


def update_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into a weights folder's metrics.json and README.md; its weights stay as they are.

    Raises:
        InputError: If the figures are not of the data that the weights were trained on.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    into_card(folder, report)


def draw_pictures(folder: Path, data: VolumeData) -> List[Tuple[str, str]]:
    """Draw the first test volume with its mask into a weights folder.

    Returns:
        (file name, caption) of each, for the card.
    """
    assert data.test is not None
    pipe = VolumeSegmentationPipeline(f'local-dir:{folder}', 'cpu')
    pipe.name = Path(folder).name
    result: Any = pipe(data.test.source(0)[0])
    result.save(Path(folder) / 'segmentation.png')
    return [('segmentation.png', 'the first test volume, bare and with its mask')]
