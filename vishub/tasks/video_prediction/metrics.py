"""How far a predicted clip is from the true one, in the scale of the field.

Video prediction does not report pixel means: its MSE and MAE are sums over a frame's channels and pixels, averaged
over clips and frames. A mean over pixels of 0.0067 on a Moving MNIST frame of 64 x 64 is an MSE of 27.4 here.
WeatherBench is the exception: there both are means over pixels, and RMSE is the root of that MSE.

All functions take clips (B, T, C, H, W), the prediction first, and give one value a frame, float64 (B, T).
`VideoMetrics` averages them over a data set, overall and by horizon.
"""
import math
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F

from vishub.errors import InputError

__all__ = ['VideoMetrics', 'absolute_error', 'psnr', 'squared_error', 'ssim']

Clip = Union[torch.Tensor, np.ndarray]

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
