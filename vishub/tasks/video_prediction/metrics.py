"""How far a predicted clip is from the true one, in the scale of the field.

Video prediction does not report pixel means: its MSE and MAE are sums over a frame's channels and pixels, averaged
over clips and frames. A mean over pixels of 0.0067 on a Moving MNIST frame of 64 x 64 is an MSE of 27.4 here.
WeatherBench is the exception: there both are means over pixels, and RMSE is the root of that MSE.

All functions take clips (B, T, C, H, W), the prediction first, and give one value a frame, float64 (B, T).
`VideoMetrics` averages them over a data set, overall and by horizon.
"""
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.tasks.base import Progress
from vishub.tasks.evaluation import budget, into_card, open_models, write_report
from vishub.tasks.video_prediction.data import ClipSet, VideoData, load_data, stack
from vishub.tasks.video_prediction.pipeline import VideoPredictionPipeline

__all__ = [
    'BASELINES', 'VideoMetrics', 'absolute_error', 'draw_pictures', 'evaluate', 'measure', 'plot_horizon', 'psnr',
    'save_evaluation', 'squared_error', 'ssim', 'update_card',
]

Clip = Union[torch.Tensor, np.ndarray]

_HORIZON = 'horizon.png'
# scikit-image's defaults: side of the uniform window, and the constants of Wang et al. 2004
_WINDOW, _K1, _K2 = 7, 0.01, 0.03


def squared_error(pred: Clip, true: Clip) -> torch.Tensor:
    """Sum over a frame's channels and pixels of (pred - true)**2; averaged, it is the field's MSE.

    Args:
        pred, true: (B, T, C, H, W), floating point, in one scale.

    Returns:
        (B, T), float64.

    Raises:
        InputError: If the shapes differ or are not those of clips, or values are integers.
    """
    pred, true = _clips(pred, true)
    return (pred - true).square().sum((2, 3, 4))


def absolute_error(pred: Clip, true: Clip) -> torch.Tensor:
    """Sum over a frame's channels and pixels of |pred - true|; averaged, it is the field's MAE. See `squared_error`."""
    pred, true = _clips(pred, true)
    return (pred - true).abs().sum((2, 3, 4))


def psnr(pred: Clip, true: Clip) -> torch.Tensor:
    """Peak signal-to-noise ratio of every frame, 20 log10(1 / sqrt(mean squared error)), in dB.

    Args:
        pred: Prediction (B, T, C, H, W); clipped to [0, 1].
        true: Truth, the same shape, values in [0, 1].

    Returns:
        (B, T), float64; infinite where a frame is predicted exactly.

    Raises:
        InputError: See `squared_error`.
    """
    pred, true = _clips(pred, true)
    return -10 * (pred.clamp(0, 1) - true).square().mean((2, 3, 4)).log10()


def ssim(pred: Clip, true: Clip, data_range: float = 2.) -> torch.Tensor:
    """Structural similarity of every frame (Wang et al. 2004), as scikit-image's `structural_similarity` by default.

    Uniform windows of 7 x 7 that lie wholly inside the frame, sample covariance, mean over channels.

    Args:
        pred: Prediction (B, T, C, H, W), sides of at least 7; clipped to [0, 1].
        true: Truth, the same shape, values in [0, 1].
        data_range: The published figures of video prediction were computed with 2, which scikit-image up to 0.19
            assumed for floating-point images when it was told nothing. For values in [0, 1] the right one is 1.

    Returns:
        (B, T), float64, at most 1.

    Raises:
        InputError: See `squared_error`; and if a side is less than 7.
    """
    pred, true = _clips(pred, true)
    batch_size, num_frames, channels, height, width = pred.shape
    if min(height, width) < _WINDOW:
        raise InputError(
            f'SSIM needs frames of at least {_WINDOW} x {_WINDOW} pixels, these have {height} x {width}')
    x, y = pred.clamp(0, 1).flatten(0, 1), true.flatten(0, 1)  # B * T, C, H, W
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (
        F.avg_pool2d(value, _WINDOW, stride=1) for value in (x, y, x * x, y * y, x * y))
    sample = _WINDOW ** 2 / (_WINDOW ** 2 - 1)
    var_x, var_y = sample * (mean_xx - mean_x ** 2), sample * (mean_yy - mean_y ** 2)
    covariance = sample * (mean_xy - mean_x * mean_y)
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / (
        (mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2))
    return similarity.mean((1, 2, 3)).unflatten(0, (batch_size, num_frames))


class VideoMetrics:
    """The metrics of a data set, batch by batch.

    Args:
        names: Which: `mse`, `mae`, `rmse`, `ssim`, `psnr`. The last two need values in [0, 1].
        mean, std: Statistics with which the clips were normalised; clips are brought back with them first. One value,
            or one for each channel.
        per_pixel: WeatherBench's habit: MSE and MAE are means over channels and pixels, not sums a frame.
        data_range: See `ssim`.

    Raises:
        InputError: If a name is unknown, or a standard deviation is not positive.
    """

    NAMES = ('mse', 'mae', 'rmse', 'ssim', 'psnr')

    def __init__(
            self,
            names: Tuple[str, ...] = ('mse', 'mae', 'ssim', 'psnr'),
            mean: Union[float, Tuple[float, ...]] = 0.,
            std: Union[float, Tuple[float, ...]] = 1.,
            per_pixel: bool = False,
            data_range: float = 2.,
    ) -> None:
        for name in names:
            if name not in self.NAMES:
                raise InputError(f'unknown metric {name!r}: there are {", ".join(self.NAMES)}')
        self.names = tuple(names)
        self.mean, self.std = (
            torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1) for value in (mean, std))
        if not (self.std > 0).all():
            raise InputError(f'std must be positive, not {std}')
        self.per_pixel = per_pixel
        self.data_range = data_range
        self.num_clips = 0
        self._sums: Dict[str, torch.Tensor] = {}  # name -> (T,)

    def update(self, pred: Clip, true: Clip) -> None:
        """Add a batch of clips (B, T, C, H, W); T must be the same in all batches.

        Raises:
            InputError: See `squared_error`; and if T, or the number of channels, is not that of before.
        """
        pred, true = _clips(pred, true)
        if self.mean.numel() not in (1, pred.shape[2]) or self.std.numel() not in (1, pred.shape[2]):
            raise InputError(
                f'mean and std have {self.mean.numel()} and {self.std.numel()} values, the clips {pred.shape[2]} '
                'channels: give one value, or one for each channel')
        mean, std = self.mean.to(pred.device), self.std.to(pred.device)
        pred, true = pred * std + mean, true * std + mean
        pixels = math.prod(pred.shape[2:]) if self.per_pixel else 1
        for name in self.names:
            if name in ('mse', 'rmse'):
                values = squared_error(pred, true) / pixels
            elif name == 'mae':
                values = absolute_error(pred, true) / pixels
            elif name == 'ssim':
                values = ssim(pred, true, self.data_range)
            else:
                values = psnr(pred, true)
            total = values.sum(0).cpu()
            before = self._sums.get(name)
            if before is not None and before.shape != total.shape:
                raise InputError(f'clips of {len(total)} frames after clips of {len(before)}: use one length')
            self._sums[name] = total if before is None else before + total
        self.num_clips += pred.shape[0]

    def compute(self) -> Dict[str, Any]:
        """The averages.

        Returns:
            Each name's mean over clips and frames; `horizon`, the same for each future frame, first to last, as
            lists; `num_clips`; and the `scale` of MSE and MAE in words. RMSE is the root of the mean of squares, not
            a mean of roots.

        Raises:
            InputError: If no clip was added.
        """
        if not self.num_clips:
            raise InputError('no clip was measured: call update first')
        figures: Dict[str, Any] = {}
        horizon: Dict[str, List[float]] = {}
        for name, total in self._sums.items():
            by_frame, overall = total / self.num_clips, total.mean() / self.num_clips
            if name == 'rmse':
                by_frame, overall = by_frame.sqrt(), overall.sqrt()
            figures[name], horizon[name] = float(overall), by_frame.tolist()
        figures['horizon'] = horizon
        figures['num_clips'] = self.num_clips
        figures['scale'] = 'mean over pixels' if self.per_pixel else 'sum over the pixels of a frame'
        return figures


# -- models by name ---------------------------------------------------------------------------------------------------

# What needs no model: (given (B, T, C, H, W), horizon) -> (B, horizon, C, H, W).
Predictor = Callable[[torch.Tensor, int], torch.Tensor]
BASELINES: Dict[str, Predictor] = {
    'last frame copied': lambda given, horizon: given[:, -1:].repeat(1, horizon, 1, 1, 1),
    'mean of the given frames': lambda given, horizon: given.mean(1, keepdim=True).repeat(1, horizon, 1, 1, 1),
    'zeros': lambda given, horizon: torch.zeros_like(given[:, :1]).repeat(1, horizon, 1, 1, 1),
}


def measure(
        predict: Predictor,
        clips: ClipSet,
        data: VideoData,
        num_given: int,
        *,
        limit: Optional[int] = None,
        batch_size: int = 16,
        advance: Optional[Callable[[int], None]] = None,
) -> Dict[str, Any]:
    """Figures of one predictor on clips.

    Args:
        predict: (given clips (B, T, C, H, W) float32 in the data's own scale, horizon) -> (B, horizon, C, H, W).
        clips: Clips of the data; the frames behind the first `num_given` are the truth.
        data: What the clips are of: tells which metrics, and their scale.
        num_given: Frames T given.
        limit: Measure at most so many clips, evenly spread.
        batch_size: Clips a forward pass.
        advance: Called with the number of clips of each batch.

    Returns:
        `num_test` (clips), `metrics` (name -> mean over clips and frames, and `mse_ci95`, the 95 % interval of the mean
        over clips), `report` with `horizon` (name -> a number a future frame) and the `scale` in words.
    """
    meter = VideoMetrics(data.metrics, per_pixel=data.per_pixel)
    count = len(clips) if limit is None else min(limit, len(clips))
    indices = np.linspace(0, len(clips) - 1, count).round().astype(int)
    of_clips: List[torch.Tensor] = []
    for first in range(0, count, batch_size):
        batch = stack(clips, indices[first:first + batch_size])
        given, true = batch[:, :num_given], batch[:, num_given:]
        predicted = predict(given, true.shape[1])
        meter.update(predicted, true)
        of_clips.append(squared_error(predicted, true).mean(1))
        if advance is not None:
            advance(len(batch))
    figures = meter.compute()
    errors = torch.cat(of_clips) / (math.prod(clips.shape[1:]) if data.per_pixel else 1)
    metrics = {name: round(figures[name], 5) for name in data.metrics}
    if count > 1:
        half = 1.96 * float(errors.std()) / count ** 0.5
        metrics['mse_ci95'] = [round(figures['mse'] - half, 5), round(figures['mse'] + half, 5)]
    horizon = {name: [round(value, 5) for value in values] for name, values in figures['horizon'].items()}
    return {'num_test': count, 'metrics': metrics, 'report': {'horizon': horizon, 'scale': figures['scale']}}


def evaluate(
        models: Sequence[Union[str, nn.Module]],
        data: Union[str, Path, VideoData],
        *,
        limit: Optional[int] = None,
        batch_size: int = 16,
        seed: int = 0,
        device: Optional[str] = None,
        progress: Optional[Progress] = None,
        horizon: Optional[int] = None,
) -> Dict[str, Any]:
    """Measure a model, its peers, and what needs no model (`BASELINES`) on the same test clips.

    Args:
        models: Names that `VideoPredictionPipeline` takes, folders of weights, or modules; the first is the model, the
            others are its peers, which must take clips of the same shape.
        data: Path for `load_data`, or data already read, whose clips then decide the horizon.
        limit: Measure at most so many clips, evenly spread over the test split.
        batch_size: Clips a forward pass.
        seed: Of generated training clips, which are not looked at: test clips are the same for every seed.
        device: See `VideoPredictionPipeline`.
        progress: Called with (clips done, clips in all).
        horizon: Future frames; as many as the model gives at a time by default.

    Returns:
        JSON values: `model`, `num_params`, `data`, `split`, `num_test`, `metrics`, `report` (see `measure`), and
        `peers`, a list of {`name`, `num_params`, `metrics`, `horizon`}.

    Raises:
        InputError: If the data have no test split, or two models are the same or take other clips.
    """
    pipes, known = open_models(VideoPredictionPipeline, models, device)
    own, *others = pipes
    first = pipes[own]
    if not isinstance(data, VideoData):
        data = load_data(data, first.frame, first.num_frames + (horizon or first.num_frames), seed=seed)
    if data.test is None or not len(data.test):
        raise InputError(f'{data.name} has no test split')
    length, *frame = data.test.shape
    for name, pipe in pipes.items():
        if tuple(frame) != pipe.frame or pipe.num_frames != first.num_frames:
            raise InputError(
                f"'{name}' takes {pipe.num_frames} frames of {' x '.join(map(str, pipe.frame))}; here are "
                f'{first.num_frames} of {" x ".join(map(str, frame))}')
    if length <= first.num_frames:
        raise InputError(f'the clips of {data.name} have {length} frames; {own} needs {first.num_frames} and a truth')

    count = len(data.test) if limit is None else min(limit, len(data.test))
    total, done = count * (len(pipes) + len(BASELINES)), 0

    def advance(clips: int) -> None:
        nonlocal done
        done += clips
        if progress is not None:
            progress(done, total)

    predictors: Dict[str, Predictor] = {name: pipe.rollout for name, pipe in pipes.items()}
    rows = []
    for name, predictor in {**predictors, **BASELINES}.items():
        figures = measure(
            predictor, data.test, data, first.num_frames, limit=limit, batch_size=batch_size, advance=advance)
        rows.append({
            'name': name, 'num_params': pipes[name].num_params if name in pipes else 0, **figures,
            **(budget(known[name]) if name in pipes else {'epochs': 0})})
    return {
        'model': own, 'num_params': first.num_params, 'data': data.name,
        'split': f'test split, {data.split}' if data.split else 'test split',
        **{key: rows[0][key] for key in ('num_test', 'metrics', 'report')},
        'peers': [
            {**{key: value for key, value in row.items() if key not in ('num_test', 'report')},
             'horizon': row['report']['horizon']} for row in rows[1:]],
    }


def save_evaluation(report: Mapping[str, Any], folder: Union[str, Path]) -> List[Path]:
    """Write what `evaluate` found: evaluation.json, and horizon.png, the error of each future frame.

    Returns:
        The files.
    """
    files = [write_report(report, folder), Path(folder) / _HORIZON]
    plot_horizon(report, files[1])
    return files


def update_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into a weights folder's metrics.json and README.md; its weights stay as they are.

    Raises:
        InputError: If the figures are not of the data that the weights were trained on.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    into_card(folder, report)
    if (Path(folder) / _HORIZON).is_file():
        plot_horizon(report, Path(folder) / _HORIZON)


def draw_pictures(folder: Path, data: VideoData, report: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """Draw the first test clip's prediction and the error over the horizon into a weights folder.

    Returns:
        (file name, caption) of each, for the card.
    """
    assert data.test is not None
    pipe = VideoPredictionPipeline(f'local-dir:{folder}', 'cpu')
    pipe.name = Path(folder).name
    result: Any = pipe(data.test.clip(0), horizon=data.test.shape[0] - pipe.num_frames)
    result.save(Path(folder) / 'prediction.png')
    plot_horizon(report, Path(folder) / _HORIZON)
    return [('prediction.png', 'the first test clip'), (_HORIZON, 'error of each future frame')]


def plot_horizon(report: Mapping[str, Any], path: Union[str, Path]) -> None:
    """Draw each future frame's MSE, one line a model, and save the picture.

    Args:
        report: What `evaluate` gives.
        path: Picture file; its suffix tells the format.
    """
    from vishub.tasks.classification.metrics import new_figure

    figure = new_figure(7, 4)
    axis = figure.subplots()
    lines = {report['model']: report['report']['horizon']}
    lines.update({peer['name']: peer['horizon'] for peer in report['peers'] if 'horizon' in peer})
    for name, horizon in lines.items():
        values = horizon['mse']
        axis.plot(range(1, len(values) + 1), values, marker='o', markersize=4, label=name)
    axis.set(xlabel='frames ahead', ylabel=f'MSE, {report["report"]["scale"]}', ylim=(0, None), title=report['data'])
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _clips(pred: Clip, true: Clip) -> Tuple[torch.Tensor, torch.Tensor]:
    """Both as float64 tensors on one device, or InputError. SSIM's variances are small differences of large numbers."""
    tensors = []
    device: Optional[torch.device] = None
    for name, value in (('prediction', pred), ('truth', true)):
        clip = torch.as_tensor(value)
        if clip.ndim != 5 or 0 in clip.shape:
            raise InputError(
                f'the {name} has shape {tuple(clip.shape)}: give clips (batch, frames, channels, height, width)')
        if not clip.is_floating_point():
            raise InputError(f'the {name} is {clip.dtype}: give floating point, uint8 frames divided by 255')
        if clip.device.type == 'mps':  # which has no float64
            clip = clip.cpu()
        device = device or clip.device
        tensors.append(clip.detach().to(device, torch.float64))
    if tensors[0].shape != tensors[1].shape:
        raise InputError(
            f'the prediction has shape {tuple(tensors[0].shape)}, the truth {tuple(tensors[1].shape)}: '
            'they must be the same')
    return tensors[0], tensors[1]
