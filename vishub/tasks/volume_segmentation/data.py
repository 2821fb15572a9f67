"""Volumes to learn segmentation from: nnU-Net's raw data set layout, BraTS as DeepMedic hands it out, and made ones.

    Dataset001_Liver/
        dataset.json                    channel_names, labels, numTraining, file_ending
        imagesTr/case_0000.nii.gz …     one file a channel
        labelsTr/case.nii.gz            integers, 0 is the background
        imagesTs/, labelsTs/            the test split, if there is one

A case is prepared (oriented, normalised, resampled) when it is first asked for and kept while there is room.
"""
import abc
import dataclasses
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset

from vishub.errors import InputError
from vishub.tasks.volume_segmentation.augmentation import augment, augmentation
from vishub.tasks.volume_segmentation.preprocessing import Preprocessing, resample_labels
from vishub.tasks.volume_segmentation.procedural import LABELS, procedural_volume
from vishub.training.recipe import SampleKey

__all__ = ['Case', 'CaseSet', 'ProceduralCases', 'StoredCases', 'TrainingPatches', 'VolumeData', 'load_data']

PROCEDURAL = 'procedural'  # what stands for a path where volumes are made
_TRAIN, _VAL, _TEST = 200, 4, 20  # made volumes of each split
_KEEP_BYTES = 4 << 30  # prepared cases held in memory


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One volume with its truth.

    Attributes:
        name: For reports; a file name, never a patient's.
        image: Prepared for the network, float32 (C, D, H, W).
        label: uint8 (D, H, W) on the same grid.
        spacing: Millimetres along D, H, W.
    """
    name: str
    image: np.ndarray
    label: np.ndarray
    spacing: Tuple[float, float, float]


class CaseSet(abc.ABC):
    """Cases by index, prepared for the network."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of cases."""

    @abc.abstractmethod
    def _make(self, index: int) -> Case:
        """Case `index`, prepared."""

    def __getitem__(self, index: int) -> Case:
        kept: Dict[int, Case] = self.__dict__.setdefault('_kept', {})
        if index not in kept:
            case = self._make(index)
            held = sum(c.image.nbytes + c.label.nbytes for c in kept.values())
            while kept and held + case.image.nbytes + case.label.nbytes > _KEEP_BYTES:
                oldest = kept.pop(next(iter(kept)))
                held -= oldest.image.nbytes + oldest.label.nbytes
            kept[index] = case
        return kept[index]

    def source(self, index: int) -> Tuple[Any, np.ndarray, Tuple[float, float, float]]:
        """What a pipeline takes for case `index`, its truth (D, H, W) on that grid, and the spacing; for evaluation."""
        case = self[index]
        return case.image, case.label, case.spacing

    def name(self, index: int) -> str:
        """What case `index` is called in reports."""
        return str(index)


class ProceduralCases(CaseSet):
    """Made volumes of 1 mm voxels; see `procedural_volume`.

    Args:
        number: How many.
        size: Voxels a side.
        seed: Of the whole set; sets of different seeds share no volume.
        preprocessing: How they are prepared.
    """

    def __init__(self, number: int, size: int, seed: int, preprocessing: Preprocessing):
        self.number, self.size, self.seed, self.preprocessing = number, size, seed, preprocessing

    def __len__(self) -> int:
        return self.number

    def _make(self, index: int) -> Case:
        image, label = procedural_volume(self.size, (self.seed, index))
        return Case(self.name(index), self.preprocessing.normalise(image[None]), label, (1., 1., 1.))

    def source(self, index: int) -> Tuple[Any, np.ndarray, Tuple[float, float, float]]:
        image, label = procedural_volume(self.size, (self.seed, index))
        return image, label, (1., 1., 1.)


class StoredCases(CaseSet):
    """Files of images and labels.

    Args:
        cases: (name, files of the channels, label file) of each.
        preprocessing: How they are prepared.
        mapping: Number in the label files -> class; identity if None.
    """

    def __init__(
            self,
            cases: Sequence[Tuple[str, Tuple[Path, ...], Path]],
            preprocessing: Preprocessing,
            mapping: Optional[Dict[int, int]] = None,
    ):
        self.cases, self.preprocessing, self.mapping = list(cases), preprocessing, mapping

    def __len__(self) -> int:
        return len(self.cases)

    def name(self, index: int) -> str:
        return self.cases[index][0]

    def _make(self, index: int) -> Case:
        from vishub.tasks.volume_segmentation.volumes import read_volume

        volume = read_volume(self.cases[index][1])
        label = self._label(index, volume)
        image = self.preprocessing.prepare(volume.data, volume.spacing)
        spacing = tuple(
            own * n / m for own, n, m in zip(volume.spacing, volume.data.shape[1:], image.shape[1:]))
        return Case(self.name(index), image, resample_labels(label, image.shape[1:]), spacing)

    def source(self, index: int) -> Tuple[Any, np.ndarray, Tuple[float, float, float]]:
        from vishub.tasks.volume_segmentation.volumes import read_volume

        volume = read_volume(self.cases[index][1])
        return volume, self._label(index, volume), volume.spacing

    def foreground(self, index: int) -> np.ndarray:
        """Grey values of the first channel where the truth is not background, for the scheme `ct`."""
        from vishub.tasks.volume_segmentation.volumes import read_volume

        volume = read_volume(self.cases[index][1])
        return volume.data[0][self._label(index, volume) > 0]

    def _label(self, index: int, volume: Any) -> np.ndarray:
        from vishub.tasks.volume_segmentation.volumes import read_volume

        path = self.cases[index][2]
        truth = read_volume(path, constant=True)
        if truth.data.shape[1:] != volume.data.shape[1:] or not np.allclose(truth.affine, volume.affine, atol=1e-3):
            raise InputError(f"the labels '{path}' lie on another grid than the volume they are for")
        label = truth.data[0]
        if (label != np.round(label)).any() or label.min() < 0 or label.max() > 255:
            raise InputError(f"the labels '{path}' are not whole numbers from 0 to 255")
        label = label.astype(np.uint8)
        if self.mapping is None:
            return label
        unknown = set(np.unique(label).tolist()) - set(self.mapping)
        if unknown:
            raise InputError(f"the labels '{path}' hold {sorted(unknown)}, which are no classes of the data set")
        table = np.zeros(256, np.uint8)
        for number, kind in self.mapping.items():
            table[number] = kind
        return table[label]


class TrainingPatches(Dataset):
    """Augmented patches by `SampleKey`, of which the side is that of a cube, or 0 for the plan's own patch.

    A third of the patches is centred on a voxel of a random foreground class, as nnU-Net does for a third of a batch.

    Args:
        cases: What they are cut from.
        patch: Size D, H, W at the side `native`; other sides scale it.
        samples: Patches an epoch.
        divisor: The network's; patches are multiples of it.
        seed: Of everything.
        augmented: Whether to augment.
    """

    def __init__(
            self, cases: CaseSet, patch: Sequence[int], samples: int, divisor: Sequence[int], seed: int = 0,
            augmented: bool = True):
        self.cases, self.patch, self.samples, self.divisor = cases, tuple(patch), samples, tuple(divisor)
        self.seed, self.augmented = seed, augmented
        self._transforms: Dict[Tuple[int, ...], Any] = {}

    def __len__(self) -> int:
        return self.samples

    def size(self, side: int) -> Tuple[int, ...]:
        """The patch scaled so that its longest side is `side`, in multiples of the divisor."""
        return tuple(max(1, round(p * side / max(self.patch) / d)) * d for p, d in zip(self.patch, self.divisor))

    def __getitem__(self, key: SampleKey) -> Tuple[torch.Tensor, torch.Tensor]:
        epoch, index, side = key
        rng = np.random.default_rng([self.seed, epoch, index])
        case = self.cases[int(rng.integers(len(self.cases)))]
        size = self.size(side)
        corner = _corner(case.label, size, rng)
        image, label = cut(case.image, corner, size), cut(case.label[None], corner, size)[0]
        if not self.augmented:
            return torch.from_numpy(image), torch.from_numpy(label)
        if size not in self._transforms:
            self._transforms[size] = augmentation(size)
        seed = zlib.crc32(np.array([self.seed, epoch, index], np.int64).tobytes())
        return augment(self._transforms[size], image, label, seed)


def _corner(label: np.ndarray, size: Sequence[int], rng: np.random.Generator) -> List[int]:
    """First voxel of a random patch; in a third of all cases around a voxel of a random foreground class."""
    room = [max(n - s, 0) for n, s in zip(label.shape, size)]
    if rng.random() < 1 / 3:
        classes = np.unique(label)
        classes = classes[classes > 0]
        if len(classes):
            places = np.flatnonzero(label == rng.choice(classes))
            centre = np.unravel_index(int(rng.choice(places)), label.shape)
            return [int(np.clip(c - s // 2, 0, r)) for c, s, r in zip(centre, size, room)]
    return [int(rng.integers(r + 1)) for r in room]


def cut(data: np.ndarray, corner: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """(C, D, H, W) -> a copy of (C, *size) from `corner` on; what lies beyond the volume is 0, the volume centred."""
    place = (slice(None), *(slice(c, c + s) for c, s in zip(corner, size)))
    part = data[place]
    missing = [s - n for s, n in zip(size, part.shape[1:])]
    return np.pad(part, [(0, 0), *((m // 2, m - m // 2) for m in missing)])


@dataclasses.dataclass(frozen=True)
class VolumeData:
    """A data set with its splits.

    Attributes:
        name: As it stands in cards.
        tag: As it stands in names of weights.
        labels: Names of the classes, the background first.
        channels: Names of the channels.
        train, val, test: Cases; None where there are none.
        preprocessing: How volumes are prepared.
        split: How the splits came about, in words.
        licence: SPDX identifier of weights trained on it.
        terms: Sentences that its licence wants to be said.
    """
    name: str
    tag: str
    labels: Tuple[str, ...]
    channels: Tuple[str, ...]
    train: Optional[CaseSet]
    val: Optional[CaseSet]
    test: Optional[CaseSet]
    preprocessing: Preprocessing
    split: str = ''
    licence: str = 'apache-2.0'
    terms: Tuple[str, ...] = ()


def load_data(
        path: Union[str, Path],
        *,
        size: int = 64,
        spacing: Optional[Sequence[float]] = None,
        intensity: Optional[str] = None,
        preprocessing: Optional[Preprocessing] = None,
        seed: int = 0,
) -> VolumeData:
    """Read a data set; its kind is told by what lies at `path`.

    Args:
        path: `procedural`; a folder in nnU-Net's raw layout; or DeepMedic's folder of BraTS volumes (`train`,
            `validation` and `test`, patients below).
        size: Of made volumes, voxels a side.
        spacing: Millimetres along D, H, W of the grid to train on; None for the median of the training volumes.
        intensity: One of `preprocessing.SCHEMES`; None chooses `ct` where the data set says so, else z-scores.
        preprocessing: All of this at once: that of a trained network, to evaluate it.
        seed: Of made training volumes. Validation and test volumes are the same for every seed.

    Raises:
        InputError: If nothing of the kind lies there, or it is damaged.
    """
    if str(path) == PROCEDURAL:
        plan = preprocessing or Preprocessing(intensity or 'zscore')
        return VolumeData(
            name=f'procedural organ and tubes, {size}^3', tag=PROCEDURAL, labels=LABELS, channels=('made',),
            # sets of other seeds than any training set's
            train=ProceduralCases(_TRAIN, size, 1000 + seed, plan), val=ProceduralCases(_VAL, size, 1, plan),
            test=ProceduralCases(_TEST, size, 2, plan), preprocessing=plan,
            split=f'{_TEST} volumes made from fixed seeds that no training volume has')
    from vishub.tasks.volume_segmentation import sources  # it imports this module

    path = Path(path)
    if (path / 'dataset.json').is_file():
        return sources.load_nnunet(path, spacing, intensity, preprocessing)
    if (path / 'train').is_dir() and any(path.glob('train/*/OTMultiClass.nii*')):
        return sources.load_brats(path, spacing, preprocessing)
    raise InputError(
        f"'{path}' is no data set: give 'procedural', a folder in nnU-Net's raw layout (with dataset.json), or "
        "DeepMedic's BraTS folder" if path.exists() else f"'{path}' does not exist")
