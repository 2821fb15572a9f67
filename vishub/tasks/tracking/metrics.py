"""Trackers by name, their peers, and the one-pass evaluation of them all on the same sequences."""
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.tasks.base import Progress, choose_device
from vishub.tasks.classification.training import describe_hardware
from vishub.tasks.evaluation import into_card, open_models, write_report
from vishub.tasks.tracking import ope
from vishub.tasks.tracking.data import TrackingData, load_data
from vishub.tasks.tracking.peers import peers
from vishub.tasks.tracking.pipeline import TrackingPipeline
from vishub.tasks.tracking.tracker import AnyTracker

__all__ = [
    'Run', 'draw_pictures', 'evaluate', 'measure', 'plot_curves', 'run_sequence', 'save_evaluation', 'save_results',
    'update_card',
]

_CURVES = 'curves.png'


class Run(NamedTuple):
    """A tracker's way through one sequence.

    Attributes:
        name: Of the sequence.
        boxes: Found, float64 (N, 4); the first is the given one.
        seconds: Of each frame, reading it not counted, (N,); the first is that of `init`.
    """
    name: str
    boxes: np.ndarray
    seconds: np.ndarray


def run_sequence(tracker: AnyTracker, video: Any, advance: Optional[Callable[[], None]] = None) -> Run:
    """Track through a sequence from its first true box on, without ever starting anew.

    Args:
        tracker: Ours or a peer's.
        video: See `data.Video`.
        advance: Called behind each frame.
    """
    boxes, seconds = np.empty((len(video), 4)), np.empty(len(video))
    for number in range(len(video)):
        frame = video.frame(number)
        begin = time.perf_counter()
        if number == 0:
            tracker.init(frame, video.box(0))
            boxes[0] = video.box(0)
        else:
            boxes[number], _ = tracker.update(frame)
        seconds[number] = time.perf_counter() - begin
        if advance is not None:
            advance()
    return Run(video.name, boxes, seconds)


def measure(runs: Sequence[Run], videos: Sequence[Any], data: TrackingData) -> Dict[str, Any]:
    """Figures of one tracker.

    Returns:
        `metrics`: what `ope.summarise` gives, rounded, with `auc_ci95` (the 95 % interval of the mean over sequences),
        of GOT-10k also `ao`; and `fps`, frames a second without reading and first frames. `success` and `precision`:
        the mean curves. `aucs`: of each sequence.
    """
    truths = [np.stack([video.box(number) for number in range(len(video))]) for video in videos]
    scores = [
        ope.score(run.boxes, truth, data.protocol, run.name) for run, truth in zip(runs, truths)]
    figures = ope.summarise(scores, data.radius)
    metrics: Dict[str, Any] = {'auc': round(figures['auc'], 4)}
    aucs = np.array([score.success.mean() for score in scores])
    if len(aucs) > 1:
        half = 1.96 * float(aucs.std(ddof=1)) / len(aucs) ** 0.5
        metrics['auc_ci95'] = [round(figures['auc'] - half, 4), round(figures['auc'] + half, 4)]
    metrics.update({name: round(value, 4) for name, value in figures.items() if name != 'auc' and np.isfinite(value)})
    if data.layout == 'GOT-10k':
        bounds = [video.frame(0).shape[1::-1] for video in videos]
        found = ope.average_overlap(
            [run.boxes for run in runs], truths, bounds, [video.cover for video in videos])
        metrics['ao'] = round(found['ao'], 4)
    seconds = sum(float(run.seconds[1:].sum()) for run in runs)
    metrics['fps'] = round(sum(len(run.seconds) - 1 for run in runs) / max(seconds, 1e-9), 1)
    return {
        'metrics': metrics,
        'success': np.mean([score.success for score in scores], axis=0).round(4).tolist(),
        'precision': np.mean([score.precision for score in scores], axis=0).round(4).tolist(),
        'aucs': aucs.round(4).tolist(),
    }


def evaluate(
        models: Sequence[Union[str, nn.Module]],
        data: Union[str, Path, TrackingData],
        *,
        limit: Optional[int] = None,
        batch_size: int = 1,
        seed: int = 0,
        device: Optional[str] = None,
        progress: Optional[Progress] = None,
        results: Union[str, Path, None] = None,
) -> Dict[str, Any]:
    """Measure a model, the same without its collection, its peers, and trackers that need no weights.

    Args:
        models: Names that `TrackingPipeline` takes, folders of weights, or modules; the first is the model, which is
            also run with `latest` and `none` in place of its collection; the others are its peers.
        data: Path for `load_data`, or data already read.
        limit: Measure at most so many sequences, evenly spread.
        batch_size: Must be 1: a tracker sees one frame after the other.
        seed: Of generated training scenes, which are not looked at: test scenes are the same for every seed.
        device: See `TrackingPipeline`.
        progress: Called with (frames done, frames in all).
        results: Folder for the boxes of all trackers, see `save_results`.

    Returns:
        JSON values: `model`, `num_params`, `data`, `split`, `num_test` (sequences), `metrics` (see `measure`; from 0
        to 1, but for fps), `report` with `protocol`, `radius` (pixels of `precision`), `frames`, `hardware` and the
        curves `success` and `precision`, and `peers`, a list of {`name`, `num_params`, `metrics`, `success`,
        `precision`}.

    Raises:
        InputError: If the data have nothing to measure on, or two models are the same.
    """
    if batch_size != 1:
        raise InputError(f'batch_size is {batch_size}: a tracker takes one frame after the other, so it is 1')
    if not isinstance(data, TrackingData):
        data = load_data(data, seed=seed)
    videos = [video for video in data.test or () if getattr(video, 'measured', True)]
    if not videos:
        raise InputError(f'{data.name} has no sequence with true boxes behind its first frame')
    if limit is not None and limit < len(videos):
        videos = [videos[place] for place in np.linspace(0, len(videos) - 1, limit).round().astype(int)]
    trackers: Dict[str, Tuple[Callable[[], AnyTracker], int]] = {}
    own = ''
    for name, pipe in open_models(TrackingPipeline, models, device)[0].items():
        trackers[name] = pipe.tracker, pipe.num_params
        if not own:
            own = name
            for update in ('latest', 'none'):
                trackers[f'{name}, {update}'] = _with(pipe, update), pipe.num_params
    trackers.update({name: (make, 0) for name, make in peers().items()})

    total, done = len(trackers) * sum(map(len, videos)), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rows = []
    for name, (make, num_params) in trackers.items():
        runs = [run_sequence(make(), video, advance) for video in videos]
        if results is not None:
            save_results(runs, Path(results) / name, data.layout)
        rows.append({'name': name, 'num_params': num_params, **measure(runs, videos, data)})
    first, *others = rows
    return {
        'model': own, 'num_params': first['num_params'], 'data': data.name,
        'split': f'{data.split}, one-pass evaluation, protocol {data.protocol}', 'num_test': len(videos),
        'metrics': first['metrics'],
        'report': {
            'protocol': data.protocol, 'radius': data.radius, 'frames': sum(map(len, videos)),
            'hardware': describe_hardware(choose_device(device)),
            'warnings': list(data.warnings), **{key: first[key] for key in ('success', 'precision', 'aucs')}},
        'peers': [{key: value for key, value in row.items() if key != 'aucs'} for row in others],
    }


def _with(pipe: TrackingPipeline, update: str) -> Callable[[], AnyTracker]:
    return lambda: pipe.tracker(template_update=update)


def save_results(runs: Sequence[Run], folder: Union[str, Path], layout: str = '') -> List[Path]:
    """Write boxes and times as the got10k toolkit reads them: a line x,y,w,h a frame, three decimals.

    Args:
        runs: One a sequence.
        folder: Of the tracker.
        layout: `GOT-10k` for SEQUENCE/SEQUENCE_001.txt and SEQUENCE_time.txt; otherwise NAME.txt and
            times/NAME_time.txt.

    Returns:
        The files.
    """
    files = []
    for run in runs:
        name = run.name.rpartition('/')[2]
        if layout == 'GOT-10k':
            boxes, times = f'{name}/{name}_001.txt', f'{name}/{name}_time.txt'
        else:
            boxes, times = f'{name}.txt', f'times/{name}_time.txt'
        lines = ''.join(','.join(f'{value:.3f}' for value in box) + '\n' for box in run.boxes)
        for place, text in ((boxes, lines), (times, ''.join(f'{value:.8f}\n' for value in run.seconds))):
            with atomic_path(Path(folder) / place) as temporary:
                temporary.write_text(text, encoding='ascii')
            files.append(Path(folder) / place)
    return files


def save_evaluation(report: Mapping[str, Any], folder: Union[str, Path]) -> List[Path]:
    """Write what `evaluate` found: evaluation.json, and curves.png, the success and precision plots.

    Returns:
        The files.
    """
    files = [write_report(report, folder), Path(folder) / _CURVES]
    plot_curves(report, files[1])
    return files


def update_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into a weights folder's metrics.json and README.md; its weights stay as they are.

    Raises:
        InputError: If the figures are not of the data that the weights were trained on.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    into_card(folder, report)
    if (Path(folder) / _CURVES).is_file():
        plot_curves(report, Path(folder) / _CURVES)


def draw_pictures(folder: Path, data: TrackingData, report: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """Draw the track through the first test sequence, and the curves, into a weights folder.

    Returns:
        (file name, caption) of each, for the card.
    """
    assert data.test
    video = data.test[0]
    pipe = TrackingPipeline(f'local-dir:{folder}', 'cpu')
    pipe.name = Path(folder).name
    result = pipe([video.frame(number) for number in range(min(len(video), 200))], box=video.box(0))
    result.save(Path(folder) / 'track.png')
    plot_curves(report, Path(folder) / _CURVES)
    return [('track.png', f'the first test sequence ({video.name})'), (_CURVES, 'success and precision')]


def plot_curves(report: Mapping[str, Any], path: Union[str, Path]) -> None:
    """Draw success and precision plots as the toolkits do, best tracker first in the legend, and save the picture."""
    from vishub.tasks.classification.metrics import new_figure

    radius = report['report']['radius']
    own = {'name': report['model'], 'metrics': report['metrics'],
           **{key: report['report'][key] for key in ('success', 'precision')}}
    figure = new_figure(11, 4.6)
    plots = zip(figure.subplots(1, 2), (
        ('success', ope.THRESHOLDS, 'auc', 'overlap threshold', 'success rate', 'Success (AUC)'),
        ('precision', ope.PIXELS, 'precision', 'centre distance, pixels', 'precision', f'Precision ({radius} px)')))
    for axis, (key, x, metric, x_label, y_label, title) in plots:
        for row in sorted([own, *report['peers']], key=lambda row: -row['metrics'][metric]):
            axis.plot(x, row[key], label=f'[{row["metrics"][metric]:.3f}] {row["name"]}',
                      linewidth=2.5 if row is own else 1.3, zorder=3 if row is own else 2)
        axis.set(xlabel=x_label, ylabel=y_label, title=title, xlim=(x[0], x[-1]), ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize='x-small')
    figure.suptitle(f'{report["data"]}: {report["num_test"]} sequences', fontsize='medium')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
