"""Pictures for deblurring: pairs of blurred and sharp ones (GoPro, RealBlur, HIDE), or sharp ones that are shaken here.

Geometry (crops, mirrors, quarter turns) is albumentations', which moves both pictures of a pair alike.
"""
import dataclasses
import random
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset

from vishub.errors import InputError, import_extra
from vishub.tasks.deblurring.shake import MAX_LENGTH, MIN_LENGTH, blur, camera_shake
from vishub.tasks.images import decode_image, images_in
from vishub.training.recipe import SampleKey

__all__ = ['DeblurData', 'Pairs', 'Photos', 'Sample', 'TrainingCrops', 'load_data']

# Kernels of evaluations are drawn from seeds that no training draws from.
_EVALUATION = 0x5AFE


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One picture of an evaluation.

    Attributes:
        name: File name of the sharp picture.
        blurred, sharp: uint8, H x W x 3.
        kernel: The shake, (S, S); None for real blur.
    """
    name: str
    blurred: np.ndarray
    sharp: np.ndarray
    kernel: Optional[np.ndarray] = None


class _Pictures:
    """Decoded pictures, kept in memory up to a limit."""

    def __init__(self, limit: int = 1 << 29):
        self.free = limit
        self.kept: Dict[Path, np.ndarray] = {}

    def __getitem__(self, path: Path) -> np.ndarray:
        """uint8, H x W x 3."""
        if path not in self.kept:
            pixels = np.asarray(decode_image(path).image)
            if pixels.nbytes > self.free:
                return pixels
            self.free -= pixels.nbytes
            self.kept[path] = pixels
        return self.kept[path]


class Photos:
    """Sharp photographs, shaken by random kernels whenever one is asked for.

    Args:
        paths: Picture files.
        lengths: Shortest and longest path of a shake, in pixels.
        noise: Standard deviation of the noise, where white is 1.
    """
    synthetic = True

    def __init__(
            self, paths: Sequence[Path], lengths: Tuple[float, float] = (MIN_LENGTH, MAX_LENGTH), noise: float = 0.005):
        self.paths, self.lengths, self.noise = list(paths), lengths, noise
        self.margin = int(lengths[1])  # a path is centred on its mean, so it may reach as far to one side
        self.pictures = _Pictures()

    def __len__(self) -> int:
        return len(self.paths)

    def crop(self, index: int, side: int, generator: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
        """A random crop of photograph `index`, blurred and sharp, uint8 (side, side, 3); no border is mirrored in it
        that the photograph has room for."""
        kernel = camera_shake(generator, generator.uniform(*self.lengths))
        margin = self.margin
        sharp = _moved(side + 2 * margin, generator, image=self.pictures[self.paths[index]])['image']
        blurred = blur(sharp, kernel, self.noise, generator)
        inner = slice(margin, margin + side)
        return blurred[inner, inner], sharp[inner, inner]

    def sample(self, index: int, side: Optional[int] = None, seed: int = 0) -> Sample:
        """Photograph `index` of an evaluation, the same whenever it is asked for with the same `seed`: its middle
        `side` x `side` pixels, or the whole, cut to multiples of 8."""
        generator = np.random.default_rng([_EVALUATION, seed, index])
        kernel = camera_shake(generator, generator.uniform(*self.lengths))
        sharp = self.pictures[self.paths[index]]
        blurred = blur(sharp, kernel, self.noise, generator)
        return Sample(self.paths[index].name, _middle(blurred, side), _middle(sharp, side), kernel)

    def take(self, count: int) -> 'Photos':
        """`count` of them, evenly spread; all where there are fewer."""
        return Photos(_spread(self.paths, count), self.lengths, self.noise)


class Pairs:
    """Blurred pictures and their sharp ones.

    Args:
        paths: (blurred file, sharp file).
    """
    synthetic = False

    def __init__(self, paths: Sequence[Tuple[Path, Path]]):
        self.paths = list(paths)
        self.pictures = _Pictures()

    def __len__(self) -> int:
        return len(self.paths)

    def pair(self, index: int) -> Tuple[np.ndarray, np.ndarray]:
        """uint8, H x W x 3, twice.

        Raises:
            InputError: If they differ in size, or cannot be read.
        """
        blurred, sharp = (self.pictures[path] for path in self.paths[index])
        if blurred.shape != sharp.shape:
            first, second = self.paths[index]
            raise InputError(
                f"'{first}' is {blurred.shape[1]} x {blurred.shape[0]} pixels, but its sharp picture '{second}' is "
                f'{sharp.shape[1]} x {sharp.shape[0]}: pairs must have one size')
        return blurred, sharp

    def crop(self, index: int, side: int, generator: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
        """As `Photos.crop`."""
        blurred, sharp = self.pair(index)
        moved = _moved(side, generator, image=blurred, sharp=sharp)
        return moved['image'], moved['sharp']

    def sample(self, index: int, side: Optional[int] = None, seed: int = 0) -> Sample:
        """As `Photos.sample`; `seed` changes nothing."""
        blurred, sharp = self.pair(index)
        return Sample(self.paths[index][1].name, _middle(blurred, side), _middle(sharp, side))

    def take(self, count: int) -> 'Pairs':
        """As `Photos.take`."""
        return Pairs(_spread(self.paths, count))


Split = Union[Photos, Pairs]


def _moved(side: int, generator: np.random.Generator, **pictures: np.ndarray) -> Dict[str, np.ndarray]:
    """Random crop, mirrors and quarter turns, the same for all pictures; small ones are mirrored outwards first."""
    A = import_extra('albumentations', 'train')
    steps = [A.PadIfNeeded(side, side, border_mode=4), A.RandomCrop(side, side), A.D4(p=1.)]  # 4: reflect_101
    compose = A.Compose(steps, additional_targets={name: 'image' for name in pictures if name != 'image'})
    compose.set_random_state(generator, random.Random(int(generator.integers(1 << 62))))
    return compose(**pictures)


def _middle(image: np.ndarray, side: Optional[int]) -> np.ndarray:
    height, width = (min(length, side or length) // 8 * 8 for length in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top:top + height, left:left + width]


def _spread(items: List[Any], count: int) -> List[Any]:
    if count >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


class TrainingCrops(Dataset):
    """Crops of a split by `SampleKey`: dicts of `blurred` and `sharp`, uint8 (3, side, side).

    Args:
        split: Where from.
        crops: Crops of each picture an epoch.
        seed: Of all randomness.
    """

    def __init__(self, split: Split, crops: int = 1, seed: int = 0):
        self.split, self.crops, self.seed = split, crops, seed

    def __len__(self) -> int:
        return len(self.split) * self.crops

    def __getitem__(self, key: SampleKey) -> Dict[str, torch.Tensor]:
        epoch, index, side = key
        generator = np.random.default_rng([self.seed, epoch, index])
        blurred, sharp = self.split.crop(index % len(self.split), side, generator)
        return {name: torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
                for name, image in (('blurred', blurred), ('sharp', sharp))}


@dataclasses.dataclass(frozen=True)
class DeblurData:
    """A data set with its splits; a split that is not there is None.

    Attributes:
        name: As it stands in cards, e.g. `BSDS500 with synthetic camera shake`.
        tag: As it stands in the names of weights, e.g. `bsds500`.
        note: What its terms ask to be said; may be empty.
    """
    name: str
    tag: str
    train: Optional[Split] = None
    val: Optional[Split] = None
    test: Optional[Split] = None
    note: str = ''

    @property
    def synthetic(self) -> bool:
        """Whether its blur is made here."""
        return any(split is not None and split.synthetic for split in (self.train, self.val, self.test))


def load_data(path: Union[str, Path]) -> DeblurData:
    """Find out what a folder holds. As their authors pack them:

    * GoPro (Nah et al. 2017): `train/SCENE/{blur,sharp}/*.png`, `test/…`; `blur_gamma` in place of `blur` too;
    * RealBlur (Rim et al. 2020): `RealBlur_{J,R}_{train,test}_list.txt`, whose lines name a sharp and a blurred file;
    * HIDE (Shen et al. 2019): `GT/*.png`, `train/*.png`, `test/**/*.png`;
    * any photographs, taken to be sharp: `train/`, `val/`, `test/`, each with pictures at any depth (BSDS500), or
      without these folders, when every tenth is for validation and every fifth for testing. They are shaken here.

    Pairs have no validation split of their own: every twentieth training pair is taken for it.

    Raises:
        InputError: If the folder does not exist, or holds none of these; or a file of a list or pair is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder: give one with photographs, or of GoPro, RealBlur or HIDE")
    for read in (_realblur, _hide, _gopro):
        data = read(folder)
        if data is not None:
            return data
    return _photos(folder)


def _with_validation(name: str, tag: str, train: List[Any], test: List[Any]) -> DeblurData:
    held_out = train[19::20]
    kept = [pair for i, pair in enumerate(train) if i % 20 != 19]
    splits = (Pairs(pairs) if pairs else None for pairs in (kept, held_out, test))
    return DeblurData(name, tag, *splits)  # type: ignore[arg-type]  # of three


def _realblur(folder: Path) -> Optional[DeblurData]:
    lists = {match['split']: (match['kind'], file) for file in sorted(folder.glob('RealBlur_*_list.txt'))
             if (match := re.fullmatch(r'RealBlur_(?P<kind>[JR])_(?P<split>train|test)_list\.txt', file.name))}
    if not lists:
        return None
    if len({kind for kind, _ in lists.values()}) > 1:
        raise InputError(f"'{folder}' has lists of RealBlur-J and of RealBlur-R: leave one kind there")
    splits: Dict[str, List[Any]] = {'train': [], 'test': []}
    for split, (_, file) in lists.items():
        for number, line in enumerate(file.read_text(encoding='utf-8').splitlines(), 1):
            if not line.strip():
                continue
            names = line.split()
            if len(names) != 2:
                raise InputError(f"'{file}', line {number} is not a sharp and a blurred file: '{line}'")
            sharp, blurred = (folder / name for name in names)
            for one in (sharp, blurred):
                if not one.is_file():
                    raise InputError(f"'{file}', line {number} names '{one}', which does not exist")
            splits[split].append((blurred, sharp))
    kind = next(iter(lists.values()))[0]
    return _with_validation(f'RealBlur-{kind}', f'realblur_{kind.lower()}', splits['train'], splits['test'])


def _hide(folder: Path) -> Optional[DeblurData]:
    if not (folder / 'GT').is_dir():
        return None
    splits: Dict[str, List[Any]] = {}
    for split in ('train', 'test'):
        files = images_in(folder / split) if (folder / split).is_dir() else []
        splits[split] = [(file, folder / 'GT' / file.name) for file in files]
        for blurred, sharp in splits[split]:
            if not sharp.is_file():
                raise InputError(f"'{blurred}' has no sharp picture '{sharp}'")
    return _with_validation('HIDE', 'hide', splits['train'], splits['test'])


def _gopro(folder: Path) -> Optional[DeblurData]:
    splits: Dict[str, List[Any]] = {'train': [], 'test': []}
    for split, pairs in splits.items():
        for scene in sorted((folder / split).glob('*/sharp')):
            kind = next((kind for kind in ('blur', 'blur_gamma') if (scene.parent / kind).is_dir()), None)
            if kind is None:
                raise InputError(f"'{scene.parent}' has no folder 'blur' beside 'sharp'")
            for sharp in images_in(scene):
                blurred = scene.parent / kind / sharp.name
                if not blurred.is_file():
                    raise InputError(f"'{sharp}' has no blurred picture '{blurred}'")
                pairs.append((blurred, sharp))
    if not any(splits.values()):
        return None
    return _with_validation('GoPro', 'gopro', splits['train'], splits['test'])


def _photos(folder: Path) -> DeblurData:
    splits = {name: images_in(folder / name) for name in ('train', 'val', 'test') if (folder / name).is_dir()}
    if not splits:
        files = images_in(folder)
        splits = {
            'val': files[9::10], 'test': files[4::5],
            'train': [file for i, file in enumerate(files) if i % 10 != 9 and i % 5 != 4]}
        splits['test'] = [file for file in splits['test'] if file not in set(splits['val'])]
    tag = re.sub(r'[^a-z0-9]+', '_', folder.resolve().name.lower()).strip('_') or 'photos'
    known = tag == 'bsds500'
    note = 'BSDS500 may be used for research and education alone, and so may weights trained on it.' if known else ''
    name = 'BSDS500' if known else folder.resolve().name
    return DeblurData(
        f'{name} with synthetic camera shake', tag,
        **{split: Photos(files) for split, files in splits.items() if files}, note=note)
