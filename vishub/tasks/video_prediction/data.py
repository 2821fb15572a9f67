"""Clips to learn prediction from: Moving MNIST, TaxiBJ, WeatherBench, and plain folders of videos.

Every set gives clips (T, C, H, W) of a length that is asked for, the given frames followed by the future ones: uint8
for pictures (255 is 1), float32 for measurements.
"""
import abc
import dataclasses
from pathlib import Path
from typing import Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset

from vishub.errors import InputError
from vishub.tasks.video_prediction.moving_digits import Digits, load_digits, moving_digits, scale_digits
from vishub.training.recipe import SampleKey

__all__ = [
    'ClipSet', 'GeneratedClips', 'StoredClips', 'TrainingClips', 'VideoData', 'as_float', 'load_data', 'stack',
]

_VAL_CLIPS, _TEST_CLIPS = 200, 1000  # of Moving MNIST, where they are generated
_FIXED = 2 ** 32 - 1  # stands for the epoch in the seed of clips that are the same in every epoch


class ClipSet(abc.ABC):
    """Clips of one shape, by index and epoch.

    Attributes:
        shape: (T, C, H, W) of every clip.
    """

    shape: Tuple[int, int, int, int]

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of clips."""

    @abc.abstractmethod
    def clip(self, index: int, epoch: int = _FIXED) -> np.ndarray:
        """Clip `index`, uint8 or float32 (T, C, H, W); generated sets have other clips in each epoch."""


class GeneratedClips(ClipSet):
    """Moving digits; see `moving_digits`.

    Args:
        items: uint8 (N, 28, 28).
        shape: (T, 1, side, side).
        num_clips: Clips an epoch.
        num_digits: Items in a clip.
        seed: Seed of the clips.
    """

    def __init__(
            self, items: np.ndarray, shape: Tuple[int, int, int, int], num_clips: int, num_digits: int = 2,
            seed: int = 0):
        if shape[1] != 1 or shape[2] != shape[3]:
            raise InputError(
                f'Moving MNIST is grey and square; the model wants {shape[1]} channel(s) of {shape[2]} x {shape[3]}')
        self.items, self.shape = scale_digits(items, shape[-1]), shape
        self.num_clips, self.num_digits, self.seed = num_clips, num_digits, seed

    def __len__(self) -> int:
        return self.num_clips

    def clip(self, index: int, epoch: int = _FIXED) -> np.ndarray:
        return moving_digits(
            self.items, self.shape[-1], self.shape[0], self.num_digits, (self.seed, epoch, index))


class StoredClips(ClipSet):
    """Windows of stored recordings.

    Args:
        recordings: uint8 or float32 arrays (time, C, H, W), memory-mapped where they are large.
        num_frames: Length T of a window.
        stride: Frames between the starts of two windows of one recording.
    """

    def __init__(self, recordings: Union[Sequence[np.ndarray], np.ndarray], num_frames: int, stride: int = 1):
        self.recordings, self.stride = list(recordings), stride
        self.shape = (num_frames, *self.recordings[0].shape[1:])
        # index of each recording's first window, and the total
        counts = [max(0, (len(recording) - num_frames) // stride + 1) for recording in self.recordings]
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def clip(self, index: int, epoch: int = _FIXED) -> np.ndarray:
        number = int(np.searchsorted(self.starts, index, side='right')) - 1
        first = (index - int(self.starts[number])) * self.stride
        return np.array(self.recordings[number][first:first + self.shape[0]])


class TrainingClips(Dataset):
    """A `ClipSet` by `SampleKey`, as the training loop asks."""

    def __init__(self, clips: ClipSet):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        epoch, index, _ = key
        return torch.from_numpy(self.clips.clip(index, epoch))


def as_float(clips: torch.Tensor) -> torch.Tensor:
    """uint8 as float32 from 0 to 1; floating-point values as float32."""
    return clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()


def stack(clips: ClipSet, indices: Union[Sequence[int], np.ndarray]) -> torch.Tensor:
    """Clips of these indices, float32 (B, T, C, H, W), as `as_float` makes them."""
    return as_float(torch.from_numpy(np.stack([clips.clip(int(index)) for index in indices])))


@dataclasses.dataclass(frozen=True)
class VideoData:
    """A data set with its splits.

    Attributes:
        name: As it stands in cards, e.g. `Moving MNIST, 2 digits, 32 x 32`.
        tag: As it stands in the names of weights, e.g. `moving_mnist`.
        train: Training clips; None where only a test file was given.
        val: Validation clips; None if there are none.
        test: Test clips; None if there are none.
        mean, std: Of each channel: models get (value - mean) / std, and give that scale back.
        metrics: Which of `VideoMetrics.NAMES` the field reports for it, the first being that of the catalogue.
        per_pixel: See `VideoMetrics`.
        split: How the splits came about, in words.
    """

    name: str
    tag: str
    train: Optional[ClipSet]
    val: Optional[ClipSet] = None
    test: Optional[ClipSet] = None
    mean: Tuple[float, ...] = (0.,)
    std: Tuple[float, ...] = (1.,)
    metrics: Tuple[str, ...] = ('mse', 'mae', 'ssim', 'psnr')
    per_pixel: bool = False
    split: str = ''

    @property
    def shape(self) -> Tuple[int, int, int, int]:
        """(T, C, H, W) of a clip."""
        clips = self.train or self.val or self.test
        assert clips is not None
        return clips.shape


def load_data(
        path: Union[str, Path],
        frame: Tuple[int, int, int],
        num_frames: int,
        *,
        num_digits: int = 2,
        num_clips: int = 10_000,
        stride: int = 1,
        seed: int = 0,
) -> VideoData:
    """Read a data set; its kind is told by what lies at `path`.

    Args:
        path: One of
            * a folder of MNIST's or Fashion-MNIST's images, see `load_digits`: Moving MNIST is made of them. If it
              also holds `mnist_test_seq.npy`, and frames are 64 x 64, that is the test split;
            * that file, or one like it: see `sources.load_moving_mnist_test`;
            * TaxiBJ's `dataset.npz`, or its folder: see `sources.load_taxibj`;
            * a folder of WeatherBench's years, netCDF or npy: see `sources.load_weather`;
            * a folder of videos, or of folders of frames: see `sources.load_videos`.
        frame: C, H, W that the model takes. Moving digits and videos are made to measure; other data have their own.
        num_frames: Length of a clip: given and future frames.
        num_digits: Digits in a clip of Moving MNIST.
        num_clips: Generated training clips an epoch.
        stride: Of videos: take every so manieth frame.
        seed: Seed of generated training clips. Validation and test clips are the same for every seed.

    Raises:
        InputError: If nothing of the kind lies there, or it is damaged.
    """
    from vishub.tasks.video_prediction import sources  # it imports this module

    path = Path(path)
    if path.is_file() and path.suffix == '.npy':
        return sources.load_moving_mnist_test(path, frame, num_frames)
    taxibj = path / 'dataset.npz' if path.is_dir() else path
    if taxibj.is_file() and taxibj.suffix == '.npz':
        return sources.load_taxibj(taxibj, num_frames)
    if not path.is_dir():
        raise InputError(
            f"'{path}' is no data set: give a folder of MNIST's images, of WeatherBench's years or of videos, Moving "
            "MNIST's test file (.npy), or TaxiBJ (.npz)" if path.exists() else f"'{path}' does not exist")
    digits = load_digits(path)
    if digits is not None:
        data = _moving_mnist(digits, (num_frames, *frame), num_digits, num_clips, seed)
        file = path / 'mnist_test_seq.npy'
        if file.is_file() and frame == (1, 64, 64) and num_digits == 2:
            published = sources.load_moving_mnist_test(file, frame, num_frames)
            data = dataclasses.replace(data, test=published.test, split=published.split)
        return data
    years = sources.find_weather(path)
    if years:
        return sources.load_weather(years, num_frames)
    return sources.load_videos(path, frame, num_frames, stride)


def _moving_mnist(
        digits: Digits, shape: Tuple[int, int, int, int], num_digits: int, num_clips: int, seed: int) -> VideoData:
    side = shape[-1]
    fashion = digits.name == 'Fashion-MNIST'
    return VideoData(
        name=f'Moving {digits.name}, {num_digits} item{"s" * (num_digits > 1)}, {side} x {side}',
        tag=f'moving_{"fashion_" * fashion}mnist' + (f'_{num_digits}' if num_digits != 2 else ''),
        train=GeneratedClips(digits.train, shape, num_clips, num_digits, seed),
        # seeds that no training run has: the epoch is another
        val=GeneratedClips(digits.val, shape, _VAL_CLIPS, num_digits, seed=1),
        test=GeneratedClips(digits.test, shape, _TEST_CLIPS, num_digits, seed=2),
        split='generated from items that no training clip has, with fixed seeds',
    )
