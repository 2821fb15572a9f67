"""Measuring networks that learnt tasks in sequence: accuracy in both protocols, AUC, and whether the heat is right.

What is measured of the sequence itself (transfer, forgetting) is in `continual.py`; it comes from training, for it
needs the network as it was after each task.
"""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.tasks.base import Progress
from vishub.tasks.evaluation import into_card, open_models, write_report
from vishub.tasks.slide_analysis.continual import (
    area_under_curve,
    backward_transfer,
    forgetting,
    forward_transfer,
    score_tasks,
)
from vishub.tasks.slide_analysis.data import EncodedTask, Item, encode_tasks, find_tasks, lesions_of, limited
from vishub.tasks.slide_analysis.features import FeatureCache, SlideFeatures
from vishub.tasks.slide_analysis.pipeline import SlideAnalysisPipeline

__all__ = [
    'evaluate', 'localisation', 'plot_tasks', 'save_evaluation', 'sequence_figures', 'truth_of_regions', 'update_card',
]

_PLOT = 'tasks.png'
_LEAST_COVER = 0.05  # of a region or patch that is lesion, so that it counts as one


def truth_of_regions(
        features: SlideFeatures, lesions: Sequence[Tuple[float, float, float, float]],
) -> Tuple[np.ndarray, np.ndarray]:
    """Which regions and patches hold a lesion: to a twentieth of a region, to half of a patch.

    Args:
        features: Of the slide; the place of its regions is used.
        lesions: Boxes (left, top, right, bottom), level-0 pixels.

    Returns:
        bool (N,) and bool (N, g, g).
    """
    grid = features.patch.shape[1]
    side = features.size / grid
    left = features.coords[:, 0, None] + side * np.arange(grid)  # N, g
    top = features.coords[:, 1, None] + side * np.arange(grid)
    cover = np.zeros((len(features), grid, grid))
    for x0, y0, x1, y1 in lesions:
        wide = (np.minimum(left + side, x1) - np.maximum(left, x0)).clip(0)
        high = (np.minimum(top + side, y1) - np.maximum(top, y0)).clip(0)
        cover += high[:, :, None] * wide[:, None, :] / side ** 2
    return cover.mean((1, 2)) >= _LEAST_COVER, cover >= 0.5


def localisation(pipe: SlideAnalysisPipeline, items: Sequence[Item]) -> Dict[str, Optional[float]]:
    """How well the heat finds annotated lesions: AUC within each slide, mean over the slides.

    Slides without annotations beside them, or whose regions are all of one kind, are left out.

    Returns:
        `region_auc` of the regions' attention, `patch_auc` of the patch map, `grad_auc` of gradient times input;
        None where no slide has annotations.
    """
    found: Dict[str, List[float]] = {'region_auc': [], 'patch_auc': [], 'grad_auc': []}
    for item in items:
        lesions = lesions_of(item.row.path)
        features = item.load()
        if not lesions or not features.size:
            continue
        regions, patches = truth_of_regions(features, lesions)
        _, region_heat, patch_heat = pipe.classify(features)
        _, _, gradient = pipe.classify(features, heat='grad')
        for name, scores, truth in (
                ('region_auc', region_heat, regions), ('patch_auc', patch_heat.ravel(), patches.ravel()),
                ('grad_auc', gradient.ravel(), patches.ravel())):
            area = area_under_curve(scores, truth)
            if area is not None:
                found[name].append(area)
    return {name: float(np.mean(areas)) if areas else None for name, areas in found.items()}


def sequence_figures(sequence: Mapping[str, Any]) -> Dict[str, Any]:
    """Figures of a run's `sequence.json`, in per cent: matrix of accuracies, transfer and forgetting.

    Returns:
        `acc` and `masked`, a row after each task with a number a task; and of sequences of two tasks or more `bwt`,
        `forgetting`, `fwt` (where known), each for the class-incremental protocol and, as `masked_…`, the other.
    """
    found: Dict[str, Any] = {}
    for protocol, prefix in (('acc', ''), ('masked', 'masked_')):
        rows = [row[protocol] for row in sequence['scores']]
        found[protocol] = [[round(100 * value, 2) for value in row] for row in rows]
        if len(rows) < 2:
            continue
        found[f'{prefix}bwt'] = round(100 * backward_transfer(rows), 2)
        found[f'{prefix}forgetting'] = round(100 * forgetting(rows), 2)
        untrained = (sequence.get('untrained') or {}).get(protocol, [])
        if len(untrained) >= len(rows) and all(len(rows[k - 1]) > k for k in range(1, len(rows))):
            found[f'{prefix}fwt'] = round(100 * forward_transfer(rows, untrained), 2)
    return found


def evaluate(
        models: Sequence[Union[str, nn.Module]],
        data: Union[str, Path, Sequence[EncodedTask]],
        *,
        limit: Optional[int] = None,
        batch_size: int = 1,
        seed: int = 0,
        device: Optional[str] = None,
        progress: Optional[Progress] = None,
        cache: Union[str, Path, None] = None,
) -> Dict[str, Any]:
    """Measure a network and its peers on the test slides of all its tasks.

    Args:
        models: Names that `SlideAnalysisPipeline` takes, folders of weights, or modules; the first is the model, the
            others are its peers, which must know the same tasks and use the same encoder.
        data: Folder that holds a folder or CSV for each task, see `read_task`; or tasks already encoded.
        limit: Measure at most so many slides, spread over tasks and classes.
        batch_size: Not used: slides differ in length and are classified one by one.
        seed: Of folds, where the data have no split of their own.
        device: See `SlideAnalysisPipeline`.
        progress: Called with (slides encoded, slides in all).
        cache: Folder of features; `features` in the folder of the data by default.

    Returns:
        JSON values: `model`, `num_params`, `data`, `split`, `num_test`, `metrics` (per cent: `acc`, the mean of the
        tasks' class-incremental accuracies, with its interval; `masked_acc`, `micro_acc`; 0 to 1: `masked_auc`,
        `multi_auc`, and `region_auc`, `patch_auc`, `grad_auc` where there are annotations; `forgetting` and `bwt` of
        its training), `report` (`tasks`, each with its figures, 0 to 1; `sequence`), and `peers`.

    Raises:
        InputError: If a task is missing, or two models are the same or know other tasks.
    """
    pipes, records = open_models(SlideAnalysisPipeline, models, device)
    own = next(iter(pipes))
    setting = pipes[own].setting
    for name, pipe in pipes.items():
        if pipe.setting != setting:
            raise InputError(f"'{name}' knows other tasks, or uses another encoder or tiling, than '{own}'")
    if isinstance(data, (str, Path)):
        title = f'slides in {Path(data).name}'
        known = records[own].get('data')
        tasks = limited(find_tasks(data, list(setting.tasks), seed=seed), limit)
        encoder = pipes[own]._encoder(None, None, False) if setting.encoder else None
        encoded, _ = encode_tasks(
            tasks, encoder, FeatureCache(cache or Path(data) / 'features'), setting.tiling, splits=('test',),
            progress=progress)
        title = known or title
    else:
        encoded, title = list(data), records[own].get('data') or 'slides'
    for task in encoded:
        if task.classes != setting.tasks.get(task.name):
            raise InputError(
                f"task '{task.name}' has the classes {', '.join(task.classes)}; '{own}' knows "
                f'{", ".join(setting.tasks.get(task.name, ())) or "no such task"}')
    rows = []
    for name, pipe in pipes.items():
        figures = _measure(pipe, encoded, records[name])
        training = records[name].get('training', {})
        rows.append({
            'name': name, 'num_params': pipe.num_params, **figures,
            **{key: training[key] for key in ('wall_s', 'epochs') if key in training}})
    return {
        'model': own, 'num_params': pipes[own].num_params, 'data': title, 'split': 'test slides of all tasks',
        'num_test': sum(len(task.test) for task in encoded),
        **{key: rows[0][key] for key in ('metrics', 'report')}, 'peers': rows[1:],
    }


def _measure(pipe: SlideAnalysisPipeline, tasks: Sequence[EncodedTask], recorded: Mapping[str, Any]) -> Dict[str, Any]:
    from vishub.tasks.slide_analysis.training import logits_of

    items = [item for task in tasks for item in task.test]
    labels = np.array([item.label for item in items])
    logits = logits_of(pipe.model, items).numpy()
    numbers = [pipe.setting.numbers(task.name) for task in tasks]
    scores = score_tasks(logits, labels, numbers)
    right = logits.argmax(1) == labels
    half = 196 * float(np.sqrt(right.mean() * (1 - right.mean()) / len(right)))
    accuracy = 100 * float(np.mean(scores['acc']))
    metrics: Dict[str, Any] = {
        'acc': accuracy, 'acc_ci95': [max(0., accuracy - half), min(100., accuracy + half)],
        'masked_acc': 100 * float(np.mean(scores['masked'])), 'micro_acc': 100 * scores['micro'],
        'masked_auc': _mean(scores['auc']), 'multi_auc': scores['multi_auc'], **localisation(pipe, items)}
    sequence = recorded.get('report', {}).get('sequence', {})
    metrics.update({key: sequence[key] for key in ('forgetting', 'bwt') if key in sequence})
    metrics = {key: _rounded(value) for key, value in metrics.items() if value is not None}
    by_task = [
        {'task': task.name, 'num_test': len(task.test), **{key: _rounded(scores[key][place])
                                                          for key in ('acc', 'masked', 'auc', 'auc_open')}}
        for place, task in enumerate(tasks)]
    return {'metrics': metrics, 'report': {'tasks': by_task, 'sequence': sequence}}


def _mean(values: Sequence[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return value if value is None else round(float(value), 4)


def save_evaluation(report: Mapping[str, Any], folder: Union[str, Path]) -> List[Path]:
    """Write what `evaluate` found: evaluation.json, and tasks.png, the accuracy on each task as the others came.

    Returns:
        The files.
    """
    files = [write_report(report, folder), Path(folder) / _PLOT]
    plot_tasks(report, files[1])
    return files


def update_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into a weights folder's metrics.json and README.md; its weights stay as they are.

    Raises:
        InputError: If the figures are not of the data that the weights were trained on.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    into_card(folder, report)
    plot_tasks(report, Path(folder) / _PLOT)


def plot_tasks(report: Mapping[str, Any], path: Union[str, Path]) -> None:
    """Draw the mean accuracy over the tasks seen so far after each task, a line a model, and the model's own tasks.

    Args:
        report: What `evaluate` gives; models without the record of their sequence have only their last point.
        path: Picture file; its suffix tells the format.
    """
    from vishub.tasks.classification.metrics import new_figure

    figure = new_figure(11, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row['task'] for row in report['report']['tasks']]
    ticks = list(range(1, len(names) + 1))
    lines = [(report['model'], report), *((peer['name'], peer) for peer in report['peers'])]
    for name, row in lines:
        matrix = row['report']['sequence'].get('acc')
        label = name.partition('.')[2] or name
        if matrix and len(matrix) == len(names):
            left.plot(ticks, [np.mean(scores[:t]) for t, scores in enumerate(matrix, 1)], marker='o', label=label)
        else:
            left.plot(ticks[-1:], [row['metrics']['acc']], marker='*', markersize=12, linestyle='', label=label)
    matrix = report['report']['sequence'].get('acc') or []
    for place, name in enumerate(names):
        points = [(t, scores[place]) for t, scores in enumerate(matrix, 1) if place < t and place < len(scores)]
        if points:
            right.plot(*zip(*points), marker='o', label=name)
    left.set(xlabel='tasks learnt', ylabel='class-incremental accuracy, %', title='mean over the tasks learnt',
             ylim=(0, 102))
    right.set(xlabel='tasks learnt', title=f'each task, {report["model"]}')
    for axis in (left, right):
        axis.set_xticks(ticks or [1])
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize='small')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)

