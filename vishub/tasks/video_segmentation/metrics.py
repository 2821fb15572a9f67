"""How well masks of clips agree with the truth, as the field measures: each frame, then the mean over all frames.

Dice, IoU, sensitivity, specificity and accuracy are of the mask (logit above 0), and 1 where both are empty. MAE and
S-measure are of the sigmoid, stretched to 0 .. 1 in each frame.
"""
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.tasks.base import Progress
from vishub.tasks.evaluation import budget, into_card, open_models, write_report
from vishub.tasks.images import SUFFIXES
from vishub.tasks.video_segmentation.data import PHANTOMS, ClipSet, SegmentationData, Video, load_data, read_mask
from vishub.tasks.video_segmentation.pipeline import VideoSegmentationPipeline
from vishub.tasks.video_segmentation.result import NOTICE, overlay

__all__ = [
    'card_entry', 'compare_folders', 'draw_pictures', 'evaluate', 'frame_figures', 's_measure', 'save_evaluation',
    'update_card',
]

ALONE = 'without context'  # a model whose earlier frames were replaced by the frame itself
_GEOMETRY = 'geometry.png'


def frame_figures(found: np.ndarray, true: np.ndarray, share: Optional[np.ndarray] = None) -> Dict[str, float]:
    """The figures of one frame.

    Args:
        found, true: Masks, bool (H, W).
        share: How sure the model is of each pixel, 0 to 1, for MAE and S-measure; by default `found`.

    Returns:
        `dice`, `iou`, `sensitivity`, `specificity`, `accuracy`, `mae`, `s_measure`, each 0 to 1.

    Raises:
        InputError: If the shapes differ.
    """
    if found.shape != true.shape or found.ndim != 2:
        raise InputError(f'the masks have shapes {found.shape} and {true.shape}: give two of one shape (H, W)')
    both, either = np.count_nonzero(found & true), np.count_nonzero(found | true)
    neither, total = found.size - either, found.size
    positives = np.count_nonzero(true)
    share = found.astype(np.float64) if share is None else np.asarray(share, np.float64)
    return {
        'dice': _ratio(2 * both, both + either),
        'iou': _ratio(both, either),
        'sensitivity': _ratio(both, positives),
        'specificity': _ratio(neither, total - positives),
        'accuracy': (both + neither) / total,
        'mae': float(np.abs(share - true).mean()),
        's_measure': s_measure(share, true),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.


def s_measure(share: np.ndarray, true: np.ndarray) -> float:
    """Structure measure (Fan et al. 2017, arXiv:1708.00786): half of objects, half of the quarters around the centroid.

    Args:
        share: (H, W), 0 to 1.
        true: bool (H, W).

    Returns:
        0 to 1; where the truth is empty, 1 less the mean; where it is full, the mean.
    """
    part = true.mean()
    if part in (0., 1.):
        return float(share.mean() if part else 1 - share.mean())
    objects = part * _object(share[true]) + (1 - part) * _object(1 - share[~true])
    height, width = true.shape
    rows, columns = np.nonzero(true)
    # the centroid's pixel belongs to the upper left quarter
    y, x = min(int(round(rows.mean())) + 1, height), min(int(round(columns.mean())) + 1, width)
    regions = 0.
    for down in (slice(None, y), slice(y, None)):
        for across in (slice(None, x), slice(x, None)):
            quarter, truth = share[down, across], true[down, across]
            if quarter.size:
                regions += quarter.size / true.size * _similarity(quarter, truth.astype(np.float64))
    return float(max(0., 0.5 * objects + 0.5 * regions))


def _object(values: np.ndarray) -> float:
    mean, spread = values.mean(), values.std(ddof=1) if values.size > 1 else 0.
    return 2 * mean / (mean ** 2 + 1 + spread + np.finfo(np.float64).eps)


def _similarity(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two quarters as wholes, without its constants."""
    mean_x, mean_y, count = x.mean(), y.mean(), max(x.size - 1, 1)
    var_x, var_y = ((x - mean_x) ** 2).sum() / count, ((y - mean_y) ** 2).sum() / count
    covariance = ((x - mean_x) * (y - mean_y)).sum() / count
    above = 4 * mean_x * mean_y * covariance
    below = (mean_x ** 2 + mean_y ** 2) * (var_x + var_y)
    if above != 0:
        return above / (below + np.finfo(np.float64).eps)
    return 1. if below == 0 else 0.


def _stretched(logits: np.ndarray) -> np.ndarray:
    """Sigmoid of one frame's logits, stretched to 0 .. 1."""
    share = 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return (share - share.min()) / (share.max() - share.min() + 1e-8)


def compare_folders(found: Union[str, Path], true: Union[str, Path], soft: bool = False) -> Dict[str, Any]:
    """Figures of mask files against true ones of the same names, in a folder and those below it.

    Args:
        found, true: Folders of pictures, 0 and 1, or 0 and 255.
        soft: Take other values: the figures of masks are then of those above a half, MAE and S-measure of all.

    Returns:
        `num_test` (frames), and `metrics`, the mean of each of `frame_figures`.

    Raises:
        InputError: If names or sizes differ.
    """
    files: List[Dict[str, Path]] = []
    for folder in (Path(found), Path(true)):
        if not folder.is_dir():
            raise InputError(f"'{folder}' is no folder: give one of mask files")
        files.append({
            str(path.relative_to(folder).with_suffix('')): path
            for path in sorted(folder.rglob('*')) if path.suffix.lower() in SUFFIXES and path.name[0] != '.'})
    if not files[0] or set(files[0]) != set(files[1]):
        differences = ', '.join(sorted(set(files[0]) ^ set(files[1]))[:3]) or 'both are empty'
        raise InputError(f"'{found}' and '{true}' do not hold masks of the same names: {differences}")
    rows = []
    for name, path in files[0].items():
        truth = read_mask(files[1][name], soft=soft)
        mask = read_mask(path, truth.shape[::-1], soft)
        rows.append(frame_figures(mask > 127, truth > 127, mask / 255))
    return {'num_test': len(rows), 'metrics': _means(rows)}


def _means(rows: Sequence[Mapping[str, float]]) -> Dict[str, float]:
    return {name: round(float(np.mean([row[name] for row in rows])), 5) for name in rows[0]}


# -- models by name ---------------------------------------------------------------------------------------------------

def _measure(
        pipe: VideoSegmentationPipeline, videos: Iterator[Video], alone: bool, batch_size: int,
        advance: Callable[[], None],
) -> List[Dict[str, float]]:
    """A row of figures for each frame that counts. `alone`: each frame stands for its own context."""
    rows = []
    for video in videos:
        if alone:
            logits = {place: next(pipe.logits([video.frames[place]]))[0] for place in video.scored}
        else:
            every = [one for values in pipe.logits(video.frames, batch_size) for one in values]
            logits = {place: every[place] for place in video.scored}
        for place, values in logits.items():
            rows.append(frame_figures(values > 0, video.masks[place], _stretched(values)))
        advance()
    return rows


def evaluate(
        models: Sequence[Union[str, nn.Module]],
        data: Union[str, Path, SegmentationData],
        *,
        limit: Optional[int] = None,
        batch_size: int = 4,
        seed: int = 0,
        device: Optional[str] = None,
        progress: Optional[Progress] = None,
) -> Dict[str, Any]:
    """Measure a model and its peers on the same test clips, and each of them without context.

    Args:
        models: Names that `VideoSegmentationPipeline` takes, folders of weights, or modules; the first is the model,
            the others are its peers.
        data: Path for `load_data`, `phantoms`, or data already read.
        limit: Measure at most so many clips of each geometry, evenly spread over the test split.
        batch_size: Frames of a clip that go through the backbone at once.
        seed: Of training phantoms, which are not looked at: test clips are the same for every seed.
        device: See `VideoSegmentationPipeline`.
        progress: Called with (clips done, clips in all).

    Returns:
        JSON values: `model`, `num_params`, `data`, `split`, `num_test` (frames), `metrics` (means over all frames, and
        the Dice of each geometry as `dice_<geometry>`, where there are several), `report` (`geometries`: the means of
        each), and `peers`, a list of {`name`, `num_params`, `metrics`}; those called `… without context` are the models
        with their earlier frames replaced by the frame itself.

    Raises:
        InputError: If the data have no test split, or two models are the same.
    """
    pipes, known = open_models(VideoSegmentationPipeline, models, device)
    own = next(iter(pipes))
    if not isinstance(data, SegmentationData):
        data = load_data(data, pipes[own].clip_size, side=max(64, pipes[own].size[0]), seed=seed)
    if not data.test:
        raise InputError(f'{data.name} has no test split')
    counts = [clips.num_videos() if limit is None else min(limit, clips.num_videos()) for clips in data.test.values()]
    total, done = 2 * len(pipes) * sum(counts), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    table = []
    for name, pipe in pipes.items():
        for alone in (False, True):
            table.append({
                'name': f'{name} {ALONE}' if alone else name, 'num_params': pipe.num_params,
                **_figures(pipe, data.test, limit, alone, batch_size, advance), **budget(known[name])})
    first, *others = table
    return {
        'model': own, 'num_params': first['num_params'], 'data': data.name,
        'split': f'test split, {data.split}' if data.split else 'test split',
        **{key: first[key] for key in ('num_test', 'metrics', 'report')},
        'peers': [{key: value for key, value in row.items() if key not in ('num_test', 'report')} for row in others],
    }


def _figures(
        pipe: VideoSegmentationPipeline, test: Mapping[str, ClipSet], limit: Optional[int], alone: bool,
        batch_size: int, advance: Callable[[], None],
) -> Dict[str, Any]:
    rows = {name: _measure(pipe, clips.videos(limit), alone, batch_size, advance) for name, clips in test.items()}
    every = [row for some in rows.values() for row in some]
    geometries = {name: _means(some) for name, some in rows.items()}
    metrics: Dict[str, Any] = _means(every)
    if len(geometries) > 1:
        metrics.update({f'dice_{name}': figures['dice'] for name, figures in geometries.items()})
    if len(every) > 1:
        half = 1.96 * float(np.std([row['dice'] for row in every], ddof=1)) / len(every) ** 0.5
        metrics['dice_ci95'] = [round(metrics['dice'] - half, 5), round(metrics['dice'] + half, 5)]
    return {'num_test': len(every), 'metrics': metrics, 'report': {'geometries': geometries}}


def save_evaluation(report: Mapping[str, Any], folder: Union[str, Path]) -> List[Path]:
    """Write what `evaluate` found: evaluation.json, and geometry.png, the Dice of each model and geometry.

    Returns:
        The files.
    """
    files = [write_report(report, folder), Path(folder) / _GEOMETRY]
    _plot_geometries(report, files[1])
    return files


def update_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into a weights folder's metrics.json and README.md; its weights stay as they are.

    Raises:
        InputError: If the figures are not of the data that the weights were trained on.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    into_card(folder, report)


def _plot_geometries(report: Mapping[str, Any], path: Path) -> None:
    from vishub.tasks.classification.metrics import new_figure

    rows = [{'name': report['model'], 'metrics': report['metrics']}, *report['peers']]
    names = [key for key in rows[0]['metrics'] if key.startswith('dice_') and key != 'dice_ci95'] or ['dice']
    figure = new_figure(8, 1.2 + 0.5 * len(rows))
    axis = figure.subplots()
    for place, name in enumerate(names):
        axis.barh(
            np.arange(len(rows)) + 0.38 * place, [row['metrics'][name] for row in rows], 0.34,
            label=name.removeprefix('dice_'))
    axis.set_yticks(np.arange(len(rows)) + 0.19 * (len(names) - 1), [row['name'] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel='Dice', xlim=(0, 1), title=report['data'])
    axis.grid(alpha=0.3, axis='x')
    axis.legend(fontsize='small')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches='tight')


def draw_pictures(folder: Path, data: SegmentationData) -> List[Tuple[str, str]]:
    """Draw some test frames with what is found and what is true into a weights folder.

    Returns:
        (file name, caption) of each, for the card.
    """
    pipe = VideoSegmentationPipeline(f'local-dir:{folder}', 'cpu')
    strips = []
    for clips in data.test.values():
        pictures = []
        for video in clips.videos(6):
            place = video.scored[-1]
            values = [one for some in pipe.logits(video.frames) for one in some][place]
            pair = [overlay(video.frames[place], mask) for mask in (video.masks[place], values > 0)]
            pictures.append(np.concatenate([np.asarray(image.resize((128, 128))) for image in pair]))
        strips.append(np.concatenate(pictures, axis=1))
    Image.fromarray(np.concatenate(strips)).save(Path(folder) / 'frames.png')
    return [('frames.png', 'test frames: the truth above what is found')]


def card_entry(name: str, data: SegmentationData, asma: float) -> Dict[str, Any]:
    """What the model card says besides figures."""
    limits = [
        NOTICE + ' No medical device.',
        'Every frame gets a mask of its own; nothing smooths them over time.',
    ]
    if data.tag == PHANTOMS:
        limits.insert(1, 'It has seen nothing but procedural phantoms (speckle, layers, shadows, one dark ellipse), no '
                         'patient and no organ. On real ultrasound it marks dark patches, whatever they are.')
    return {
        'description':
            f'`{name.partition(".")[0]}` marks a lesion in every frame of an ultrasound clip. Trained on {data.name}'
            + (f', each clip with probability {asma:g} in the other scan geometry.' if asma else '.')
            + f' Figures are means over frames; "{ALONE}" are the same weights with the earlier frames replaced by the '
              'frame itself.',
        'use':
            'import vishub\n\n'
            f"pipe = vishub.pipeline('video_segmentation', '{name}')\n"
            "result = pipe('clip.mp4')   # or a DICOM clip, a folder of frames, an array\n"
            "result.save('overlay.mp4')  # .zip of masks, .nii.gz, .csv of areas, .png, .json too\n",
        'limits': limits,
    }
