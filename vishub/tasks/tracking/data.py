"""What a tracker learns from and is measured on: scenes made on the fly, and folders of sequences with boxes."""
import abc
import dataclasses
from pathlib import Path
from typing import Any, List, Optional, Protocol, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset

from vishub.errors import InputError
from vishub.tasks.tracking.crops import SEARCH_FACTOR, TEMPLATE_FACTOR, box_in_crop, crop, crop_side, mean_colour
from vishub.tasks.tracking.scenes import NoiseTextures, PhotoTextures, Scene, Textures, find_photos
from vishub.training.recipe import SampleKey

__all__ = ['GeneratedScenes', 'PairSamples', 'StoredVideos', 'TrackingData', 'Video', 'VideoSet', 'load_data']

_FIXED = 2 ** 32 - 1  # stands for the epoch in the seed of scenes that are the same in every epoch
_VAL_SCENES, _TEST_SCENES, _TEST_FRAMES = 64, 20, 100
_SCENE_FRAMES = 160  # of a training scene: the target's looks change and come back
# Frames between a template and the search frame: later templates near, the initial one anywhere in TransT's range.
_NEAR, _FAR = 40, 100


class Video(Protocol):
    """Frames with the box of one target in each: a generated scene, or a stored sequence."""

    name: str

    def __len__(self) -> int: ...

    def box(self, number: int) -> np.ndarray:
        """x, y, w, h in pixels, float64 (4,); NaN where the target is absent."""

    def frame(self, number: int) -> np.ndarray:
        """uint8 (H, W, 3)."""


class VideoSet(abc.ABC):
    """Videos by index and epoch."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of videos."""

    @abc.abstractmethod
    def video(self, index: int, epoch: int = _FIXED) -> Any:
        """Video `index`; generated sets have others in each epoch."""


class GeneratedScenes(VideoSet):
    """See `Scene`.

    Args:
        textures: Where pictures come from.
        num_scenes: Scenes an epoch.
        length: Frames of each.
        seed: Seed of all of them.
        fade: See `Scene`.
    """

    def __init__(
            self, textures: Textures, num_scenes: int, length: int = _TEST_FRAMES, seed: int = 0,
            fade: Optional[float] = 0.):
        self.textures, self.num_scenes, self.length, self.seed, self.fade = textures, num_scenes, length, seed, fade

    def __len__(self) -> int:
        return self.num_scenes

    def video(self, index: int, epoch: int = _FIXED) -> Scene:
        return Scene(self.textures, (self.seed, epoch, index), self.length, fade=self.fade, name=f'scene-{index + 1}')


class _Present:
    """A sequence without the frames in which the target is absent."""

    def __init__(self, video: Any):
        boxes = np.stack([video.box(number) for number in range(len(video))])
        self.name, self._video = video.name, video
        self._numbers = np.flatnonzero(np.isfinite(boxes).all(1) & (boxes[:, 2:] >= 1).all(1))

    def __len__(self) -> int:
        return len(self._numbers)

    def box(self, number: int) -> np.ndarray:
        return self._video.box(int(self._numbers[number]))

    def frame(self, number: int) -> np.ndarray:
        return self._video.frame(int(self._numbers[number]))


class StoredVideos(VideoSet):
    """Sequences to learn from, each as many times an epoch as fills `num_samples`; absent targets are left out."""

    def __init__(self, sequences: Sequence[Any], num_samples: int):
        self.videos = [video for video in map(_Present, sequences) if len(video) > 1]
        if not self.videos:
            raise InputError('no sequence has two frames in which its target can be seen')
        self.num_samples = max(num_samples, len(self.videos))

    def __len__(self) -> int:
        return self.num_samples

    def video(self, index: int, epoch: int = _FIXED) -> Any:
        return self.videos[index % len(self.videos)]


class PairSamples(Dataset):
    """Templates and a search crop of one video, by `SampleKey`.

    Templates are cut at the true box. The search crop is cut around a box whose sides are scaled by
    exp(N(0, 0.25**2)) and whose centre moves uniformly within 1.5 (w + h) / 2 on each axis; of a whole sample 5 % are
    grey and half mirrored, each crop's brightness changes by 0.8 to 1.2 (TransT's values, but for the mirroring).

    A sample is a dict: `templates` uint8 (K, 3, h, w), the initial one first; `search` uint8 (3, H, W); `box`
    float32 (4,), cx, cy, w, h in units of the search crop; `present`, whether the target is there.

    Args:
        videos: Videos.
        num_templates: Templates K of a sample.
        template_size, search_size: Sides of the crops.
        absent: Share of the samples whose search crop does not hold the target, but another video or some other place
            of the same frame.
        augment: Grey, mirrored and brighter samples.
    """

    def __init__(
            self, videos: VideoSet, num_templates: int, template_size: int, search_size: int, absent: float = 0.,
            augment: bool = True):
        self.videos, self.num_templates = videos, num_templates
        self.template_size, self.search_size = template_size, search_size
        self.absent, self.augment = absent, augment

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index, _ = key
        rng = np.random.default_rng([epoch, index, 1])
        video = self.videos.video(index, epoch)
        numbers, seen = _choose_frames(rng, len(video), self.num_templates)
        templates = []
        for number in numbers:
            frame, box = video.frame(number), video.box(number)
            templates.append(crop(
                frame, (box[0] + box[2] / 2, box[1] + box[3] / 2), crop_side(box[2], box[3], TEMPLATE_FACTOR),
                self.template_size, mean_colour(frame)))
        present = rng.random() >= self.absent
        frame, box = video.frame(seen), video.box(seen)
        if not present and rng.random() < 0.5:
            other = self.videos.video((index + 1 + int(rng.integers(len(self) - 1))) % len(self), epoch)
            number = int(rng.integers(len(other)))
            frame, box = other.frame(number), other.box(number)
            centre, side = _around(rng, box)
        elif not present:
            centre, side = _elsewhere(rng, box, frame.shape[1], frame.shape[0])
        else:
            centre, side = _around(rng, box)
        search = crop(frame, centre, side, self.search_size, mean_colour(frame))
        target = box_in_crop(box, centre, side)
        crops = [*templates, search]
        if self.augment:
            if rng.random() < 0.05:
                crops = [np.repeat(c.mean(2, keepdims=True), 3, axis=2) for c in crops]
            crops = [(c * rng.uniform(0.8, 1.2)).clip(0, 255).astype(np.uint8) for c in crops]
            if rng.random() < 0.5:
                crops = [c[:, ::-1] for c in crops]
                target[0] = 1 - target[0]
        tensors = [torch.from_numpy(np.ascontiguousarray(c.transpose(2, 0, 1))) for c in crops]
        return {
            'templates': torch.stack(tensors[:-1]), 'search': tensors[-1], 'box': torch.from_numpy(target),
            'present': torch.tensor(present)}


def _choose_frames(rng: np.random.Generator, length: int, count: int) -> Tuple[List[int], int]:
    """Numbers of the template frames, the earliest first, and of the search frame."""
    seen = int(rng.integers(length))
    far = _NEAR if rng.random() < 0.5 else _FAR
    gaps = [int(rng.integers(1, far + 1))]
    gaps += [int(rng.integers(1, min(_NEAR, gaps[0]) + 1)) for _ in range(count - 1)]
    if seen < gaps[0]:  # not enough past: the video is taken backwards
        numbers = [seen + gap for gap in gaps]
    else:
        numbers = [seen - gap for gap in gaps]
    return [min(max(number, 0), length - 1) for number in numbers], seen


def _around(rng: np.random.Generator, box: np.ndarray) -> Tuple[Tuple[float, float], int]:
    """Centre and side of a search crop that the target is somewhere in."""
    x, y, w, h = box
    w, h = np.array([w, h]) * np.exp(rng.normal(0, 0.25, 2))
    reach = 1.5 * (w + h) / 2
    centre = box[:2] + box[2:] / 2 + rng.uniform(-reach, reach, 2)
    return (float(centre[0]), float(centre[1])), crop_side(w, h, SEARCH_FACTOR)


def _elsewhere(rng: np.random.Generator, box: np.ndarray, width: int, height: int) -> Tuple[Tuple[float, float], int]:
    """Centre and side of a search crop of the same frame that shares less than a tenth of the target with it."""
    side = crop_side(box[2], box[3], SEARCH_FACTOR)
    best, least = (0., 0.), np.inf
    for _ in range(20):
        centre = rng.uniform(0, [width, height])
        low, high = np.maximum(centre - side / 2, box[:2]), np.minimum(centre + side / 2, box[:2] + box[2:])
        shared = (high - low).clip(min=0).prod() / box[2:].prod()
        if shared < least:
            best, least = (float(centre[0]), float(centre[1])), shared
        if least < 0.1:
            break
    return best, side


@dataclasses.dataclass(frozen=True)
class TrackingData:
    """A data set with its splits.

    Attributes:
        name: As it stands in cards.
        tag: As it stands in the names of weights, e.g. `scenes`.
        train: Training videos; None if there are none.
        val: Validation videos; None if there are none.
        test: Videos to track through; None if there are none.
        radius: Pixels within which precision counts a centre as hit; 20 is the field's.
        protocol: `pysot` or `got10k`, see `metrics.ope`.
        layout: Name of the folder layout; `scenes` for generated ones.
        split: What the test split is, in words.
        warnings: What was left out.
    """

    name: str
    tag: str
    train: Optional[VideoSet] = None
    val: Optional[VideoSet] = None
    test: Optional[Sequence[Any]] = None
    radius: int = 20
    protocol: str = 'pysot'
    layout: str = 'scenes'
    split: str = ''
    warnings: Tuple[str, ...] = ()


def load_data(path: Union[str, Path], *, num_samples: int = 8000, seed: int = 0) -> TrackingData:
    """Read a data set; its kind is told by what lies at `path`.

    Args:
        path: One of
            * a folder of photographs, with or without folders train, val and test: scenes are cut from them;
            * the word `noise`: scenes of noise, which need nothing;
            * a benchmark in one of the layouts of `layouts.LAYOUTS`: all sequences are the test split, and GOT-10k's
              and LaSOT's sequences (of GOT-10k: `train`) can be trained on.
        num_samples: Training samples an epoch.
        seed: Seed of generated training scenes. Validation and test scenes are the same for every seed.

    Raises:
        InputError: If nothing of the kind lies there, or it is damaged.
    """
    if str(path) == 'noise':
        noise = NoiseTextures()
        return _scenes('scenes of noise', 'noise', [noise] * 3, num_samples, seed)
    path = Path(path)
    if not path.exists():
        raise InputError(f"'{path}' does not exist: give a folder of photographs or of sequences, or the word noise")
    from vishub.tasks.tracking import layouts  # it imports this module

    if layouts.detect(path) is None and path.is_dir() and layouts.holds_photos(path):
        photos = find_photos(path)
        textures = [PhotoTextures(photos[split], path.name) for split in ('train', 'val', 'test')]
        return _scenes(f'scenes cut from {path.name}', 'scenes', textures, num_samples, seed)
    return layouts.load_benchmark(path, num_samples)


def _scenes(name: str, tag: str, textures: Sequence[Textures], num_samples: int, seed: int) -> TrackingData:
    train, val, test = textures
    held_out = GeneratedScenes(test, _TEST_SCENES, seed=2)
    return TrackingData(
        name=name, tag=tag,
        train=GeneratedScenes(train, num_samples, _SCENE_FRAMES, seed, fade=None),
        # seeds that no training run has: the epoch is another
        val=GeneratedScenes(val, _VAL_SCENES * 4, _SCENE_FRAMES, seed=1, fade=None),
        test=[held_out.video(index) for index in range(len(held_out))],
        radius=8,
        split=f'{_TEST_SCENES} scenes of {_TEST_FRAMES} frames with fixed seeds'
              + ('' if tag == 'noise' else ', cut from photographs that no training scene has'),
    )
