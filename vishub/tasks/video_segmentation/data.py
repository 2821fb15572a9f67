"""Clips with masks to learn segmentation from: procedural phantoms, and folders of frames and masks."""
import abc
import dataclasses
import math
import re
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from vishub.errors import InputError
from vishub.models.astr import clip_indices
from vishub.tasks.images import SUFFIXES, decode_image
from vishub.tasks.video_segmentation.geometry import Sector, find_sector
from vishub.tasks.video_segmentation.phantoms import SECTOR, as_sector, phantom
from vishub.training.recipe import SampleKey

__all__ = [
    'PHANTOMS', 'ClipSet', 'FolderClips', 'PhantomClips', 'SegmentationData', 'TrainingClips', 'Video', 'dilate',
    'load_data', 'read_mask',
]

PHANTOMS = 'phantoms'  # what stands in the place of a path
_VAL_CLIPS, _TEST_CLIPS = 32, 64  # of each geometry
_FIXED = 2 ** 32 - 1  # stands for the epoch in the seed of clips that are the same in every epoch
_BODY = 25  # pixels by which the official recipe widens masks for the coarse maps, at the original resolution
_BODY_PHANTOM = 5


class Video(NamedTuple):
    """A recording with its truth, in the order of time.

    Attributes:
        name: For messages.
        frames: uint8 RGB (n, H, W, 3).
        masks: bool (n, H, W).
        scored: Which frames count in the evaluation.
    """
    name: str
    frames: np.ndarray
    masks: np.ndarray
    scored: Sequence[int]


class ClipSet(abc.ABC):
    """Clips of T frames, frame 0 the one to segment, and the recordings that they are of.

    Attributes:
        geometry: `linear`, `sector`, or empty where nobody said.
    """

    geometry: str = ''

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of clips."""

    @abc.abstractmethod
    def sample(self, index: int, side: int, epoch: int = _FIXED) -> Dict[str, torch.Tensor]:
        """Clip `index`, scaled to `side` pixels.

        Returns:
            `frames` uint8 (T, 3, side, side); `masks` and `body`, the masks widened, uint8 (T, side, side), 255 in
            the lesion, soft at its edge; `sector`, float32 (2,): angle and r0 of a sector, zeros otherwise.
        """

    @abc.abstractmethod
    def videos(self, limit: Optional[int] = None) -> Iterator[Video]:
        """The recordings, whole; at most `limit` of them, evenly spread."""

    @abc.abstractmethod
    def num_videos(self) -> int:
        """Number of recordings."""


class PhantomClips(ClipSet):
    """Procedural clips; see `phantom`.

    Args:
        num_clips: Clips an epoch.
        clip_size: Frames T.
        seed: Seed of the clips.
        geometry: `linear` or `sector`.
        side: Height and width in pixels of the recordings that are measured.
    """

    def __init__(self, num_clips: int, clip_size: int, seed: int, geometry: str = 'linear', side: int = 64):
        self.num_clips, self.clip_size, self.seed, self.geometry = num_clips, clip_size, seed, geometry
        self.side = side

    def __len__(self) -> int:
        return self.num_clips

    def _clip(self, index: int, side: int, epoch: int) -> Tuple[np.ndarray, np.ndarray]:
        clip = phantom((self.seed, epoch, index), self.clip_size, side)
        return as_sector(clip) if self.geometry == 'sector' else clip

    def sample(self, index: int, side: int, epoch: int = _FIXED) -> Dict[str, torch.Tensor]:
        frames, masks = (torch.from_numpy(values[::-1].copy()) for values in self._clip(index, side, epoch))
        masks = masks.byte() * 255
        sector = torch.stack([*SECTOR]) if self.geometry == 'sector' else torch.zeros(2)
        return {
            'frames': frames[:, None].expand(-1, 3, -1, -1), 'masks': masks, 'body': dilate(masks, _BODY_PHANTOM),
            'sector': sector}

    def videos(self, limit: Optional[int] = None) -> Iterator[Video]:
        for index in _spread(self.num_clips, limit):
            frames, masks = self._clip(index, self.side, _FIXED)
            yield Video(
                f'phantom {index}', np.repeat(frames[..., None], 3, axis=3), masks, scored=[self.clip_size - 1])

    def num_videos(self) -> int:
        return self.num_clips


class _Recording(NamedTuple):
    name: str
    frames: List[Path]
    masks: List[Path]


class FolderClips(ClipSet):
    """Folders of frames with masks of the same names. Every frame is the one to segment once.

    Args:
        recordings: Frames and masks in order.
        clip_size: Frames T.
        geometry: `linear`, `sector` (then every recording's sector is found on its first frame, and frames are cropped
            to it for training), or empty.
        soft: Take masks of other values than 0 and 1, or 0 and 255.
    """

    def __init__(self, recordings: Sequence[_Recording], clip_size: int, geometry: str = '', soft: bool = False):
        self.recordings, self.clip_size, self.geometry, self.soft = list(recordings), clip_size, geometry, soft
        self.ends = np.cumsum([len(recording.frames) for recording in self.recordings])
        self._sectors: Dict[int, Tuple[Sector, Tuple[int, int, int, int]]] = {}  # found when first asked for

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _sector(self, number: int) -> Tuple[Sector, Tuple[int, int, int, int]]:
        if number not in self._sectors:
            first = self.recordings[number].frames[0]
            try:
                self._sectors[number] = find_sector(np.asarray(decode_image(first).image))
            except InputError as error:
                raise InputError(f"'{first}': {error}") from error
        return self._sectors[number]

    def sample(self, index: int, side: int, epoch: int = _FIXED) -> Dict[str, torch.Tensor]:
        number = int(np.searchsorted(self.ends, index, side='right'))
        recording = self.recordings[number]
        frame = index - int(self.ends[number]) + len(recording.frames)
        sector, box = self._sector(number) if self.geometry == 'sector' else (None, None)
        parts: Dict[str, List[np.ndarray]] = {'frames': [], 'masks': [], 'body': []}
        for place in clip_indices(frame, self.clip_size, len(recording.frames)):
            image = decode_image(recording.frames[place]).image
            mask = read_mask(recording.masks[place], image.size, self.soft)
            body = dilate(torch.from_numpy(mask)[None], _BODY)[0].numpy()
            for key, picture in (('frames', image), ('masks', mask), ('body', body)):
                scaled = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
                scaled = scaled.crop(box) if box else scaled
                parts[key].append(np.asarray(scaled.resize((side, side), Image.Resampling.BILINEAR)))
        sample = {key: torch.from_numpy(np.stack(values)) for key, values in parts.items()}
        sample['frames'] = sample['frames'].permute(0, 3, 1, 2).contiguous()
        sample['sector'] = torch.zeros(2) if sector is None else torch.stack([*sector])
        return sample

    def videos(self, limit: Optional[int] = None) -> Iterator[Video]:
        for number in _spread(len(self.recordings), limit):
            recording = self.recordings[number]
            images = [decode_image(file).image for file in recording.frames]
            for file, image in zip(recording.frames, images):
                if image.size != images[0].size:
                    raise InputError(
                        f"'{file}' has {image.width} x {image.height} pixels, the frames before it "
                        f'{images[0].width} x {images[0].height}: a video has one size')
            masks = [read_mask(file, images[0].size, self.soft) for file in recording.masks]
            yield Video(
                recording.name, np.stack([np.asarray(image) for image in images]), np.stack(masks) > 127,
                scored=range(len(images)))

    def num_videos(self) -> int:
        return len(self.recordings)


class TrainingClips(Dataset):
    """A `ClipSet` by `SampleKey`, as the training loop asks."""

    def __init__(self, clips: ClipSet):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: SampleKey) -> Dict[str, torch.Tensor]:
        epoch, index, side = key
        return self.clips.sample(index, side, epoch)


@dataclasses.dataclass(frozen=True)
class SegmentationData:
    """A data set with its splits.

    Attributes:
        name: As it stands in cards.
        tag: As it stands in the names of weights.
        train: Training clips; None where there are none.
        val, test: Clips of each geometry, by its name; empty where there are none.
        split: How the splits came about, in words.
    """

    name: str
    tag: str
    train: Optional[ClipSet]
    val: Mapping[str, ClipSet]
    test: Mapping[str, ClipSet]
    split: str = ''


def load_data(
        path: Union[str, Path],
        clip_size: int = 3,
        *,
        num_clips: int = 1000,
        geometry: str = '',
        soft: bool = False,
        side: int = 64,
        seed: int = 0,
) -> SegmentationData:
    """Read a data set.

    Args:
        path: `phantoms` for procedural clips (trained on linear ones, measured on both geometries), or a folder:

            * `{train,train_aug,val,test}/image/<video>/<frame>` and masks of the same names in `mask/` beside `image/`,
              as ERUS-10K has them; without `val`, every tenth training video validates;
            * `image/<video>/<frame>` and `mask/…` without splits: the last fifth of the videos, by name, are the test
              split.

            `images` and `masks` are understood, too.
        clip_size: Frames T of a clip.
        num_clips: Phantoms an epoch.
        geometry: How a folder's videos were scanned, all of them: `linear`, `sector`, or empty if they differ or it is
            unknown (then the scanning-mode augmentation stays off).
        soft: Take masks of other values than 0 and 1, or 0 and 255, as lossy pictures have.
        side: Height and width of the phantoms that are measured.
        seed: Seed of training phantoms. Validation and test clips are the same for every seed.

    Raises:
        InputError: If there are no such folders, or frames and masks do not belong together.
    """
    if geometry not in ('', 'linear', 'sector'):
        raise InputError(f"geometry is '{geometry}': give linear or sector, or leave it out")
    if str(path) == PHANTOMS and not Path(path).exists():
        # seeds that no training run has: the epoch is another
        def fixed(count: int, number: int) -> Dict[str, ClipSet]:
            return {name: PhantomClips(count, clip_size, number, name, side) for name in ('linear', 'sector')}

        return SegmentationData(
            'procedural phantoms', PHANTOMS, PhantomClips(num_clips, clip_size, seed), fixed(_VAL_CLIPS, 1),
            fixed(_TEST_CLIPS, 2), 'generated with fixed seeds')
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"'{root}' is no folder: give {PHANTOMS}, or a folder with image/<video>/<frame> and mask/…")
    splits = {name: _recordings(root / name) for name in ('train', 'train_aug', 'val', 'test')}
    own = any(splits.values())
    if own:
        splits['train'] += splits.pop('train_aug')
        if not splits['val'] and len(splits['train']) > 1:
            splits['val'] = splits['train'][::10]
            splits['train'] = [item for item in splits['train'] if item not in splits['val']]
    else:
        videos = _recordings(root)
        count = len(videos)
        last = max(1, math.ceil(count / 5)) if count > 1 else 0
        splits = {'train': videos[:count - last], 'val': [], 'test': videos[count - last:]}
    if not any(splits.values()):
        raise InputError(
            f"'{root}' holds no frames with masks: give image/<video>/<frame> and mask/<video>/<frame>, alone or in "
            'the folders train and test')
    sets = {
        name: FolderClips(items, clip_size, geometry, soft) if items else None for name, items in splits.items()}
    label = geometry or 'frames'
    return SegmentationData(
        name=f'frames of {root.name}', tag=re.sub(r'\W+', '_', root.name.lower()), train=sets['train'],
        val={label: sets['val']} if sets['val'] else {}, test={label: sets['test']} if sets['test'] else {},
        split='of its own folder' if own else 'the last fifth of the videos')


def _recordings(root: Path) -> List[_Recording]:
    """The videos in `image/` of a folder, with their masks."""
    for plural in ('', 's'):
        images, masks = root / f'image{plural}', root / f'mask{plural}'
        if images.is_dir():
            break
    else:
        return []
    if not masks.is_dir():
        raise InputError(f"'{images}' has no masks beside it: '{masks}' does not exist")
    folders = [folder for folder in sorted(images.iterdir()) if folder.is_dir() and folder.name[0] != '.'] or [images]
    found = []
    for folder in folders:
        frames, truth = _pictures(folder), _pictures(masks / folder.relative_to(images))
        names, others = ({file.stem for file in files} for files in (frames, truth))
        if names != others:
            differences = ', '.join(sorted(names ^ others)[:3])
            raise InputError(
                f"'{folder}' has {len(names)} frames and its masks {len(others)}, not of the same names: {differences}"
                + (' …' if len(names ^ others) > 3 else ''))
        if frames:
            found.append(_Recording(folder.name, frames, truth))
    return found


def _pictures(folder: Path) -> List[Path]:
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.name[0] != '.')


def read_mask(path: Union[str, Path], size: Optional[Tuple[int, int]] = None, soft: bool = False) -> np.ndarray:
    """A mask file as uint8 (H, W), 255 in the lesion.

    Args:
        path: Picture of 0 and 1, or 0 and 255.
        size: Width and height that it must have.
        soft: Take other values, scaled so that the largest is 255.

    Raises:
        InputError: If it has other values or another size.
    """
    mask = np.asarray(decode_image(path).image.convert('L'))
    if size is not None and mask.shape[::-1] != size:
        raise InputError(
            f"the mask '{path}' has {mask.shape[1]} x {mask.shape[0]} pixels, its frame {size[0]} x {size[1]}")
    values = np.unique(mask)
    peak = int(values[-1])
    if not soft and not set(values.tolist()) <= {0, peak} or not soft and peak not in (0, 1, 255):
        raise InputError(
            f"the mask '{path}' has {len(values)} values up to {peak}: give 0 and 1, or 0 and 255, or ask for soft "
            'masks')
    if peak in (0, 255):
        return mask
    return np.round(mask * (255 / peak)).astype(np.uint8)


def dilate(masks: torch.Tensor, side: int) -> torch.Tensor:
    """Masks (n, H, W) uint8, widened by a square of `side` pixels: the targets of the coarse maps."""
    return F.max_pool2d(masks[:, None].float(), side, 1, side // 2)[:, 0].byte()


def _spread(count: int, limit: Optional[int]) -> List[int]:
    """At most `limit` of `count` places, evenly spread."""
    return np.linspace(0, count - 1, count if limit is None else min(limit, count)).round().astype(int).tolist()
