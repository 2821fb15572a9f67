"""Labelled images for classification: image folders, CSV files, CIFAR-10 and Fashion-MNIST, as arrays of uint8.

Small sets are decoded once and kept in memory, since on a few cores decoding would cost as much as training.
Augmentation (albumentations) works on the images as stored; resizing to the training side and normalising are done
on the whole batch, by the recipe.
"""
import dataclasses
import gzip
import io
import pickle
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vishub.errors import InputError
from vishub.tasks.augmentation import AUGMENTATIONS, Augmentation, check_policy, make_augmentation
from vishub.tasks.images import decode_image, images_in
from vishub.training.recipe import SampleKey

__all__ = [
    'AUGMENTATIONS', 'AugmentedSet', 'ImageData', 'ImageSet', 'Indices', 'load_data', 'make_augmentation',
    'with_validation_of_each_class',
]

VALIDATION_SHARE = 0.1  # 5,000 of CIFAR-10's training images, 6,000 of Fashion-MNIST's
CIFAR10_CLASSES = (
    'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
FASHION_MNIST_CLASSES = (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')

# class indices, or indices of images
Indices = Union[Sequence[int], np.ndarray]


class ImageSet:
    """Images with labels, in memory or on disk.

    Args:
        images: uint8 array `(N, H, W, C)`, or paths of image files, or objects whose `read()` gives what
            `decode_image` takes.
        labels: Class index of every image.
        in_chans: Channels that images of files are decoded to: 1 grey, 3 RGB.
    """

    def __init__(self, images: Union[np.ndarray, Sequence[Any]], labels: Indices, in_chans: int = 3):
        if len(images) != len(labels):
            raise InputError(f'{len(images)} images but {len(labels)} labels')
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.in_chans = images.shape[-1] if isinstance(images, np.ndarray) else in_chans

    @property
    def native_side(self) -> Optional[Tuple[int, int]]:
        """(height, width) if all images have one size, None for files."""
        return self.images.shape[1:3] if isinstance(self.images, np.ndarray) else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """Image `index` as uint8 `(H, W, C)`; a file is decoded as the pipeline does (upright, white behind it)."""
        if isinstance(self.images, np.ndarray):
            return self.images[index]
        source = self.images[index]
        image = decode_image(source if isinstance(source, Path) else source.read()).image
        array = np.asarray(image.convert('L') if self.in_chans == 1 else image)
        return array.reshape(*array.shape[:2], self.in_chans)

    def check(self) -> None:
        """Decode every file once.

        Raises:
            InputError: If any cannot be decoded; names the first and says how many more there are.
        """
        if isinstance(self.images, np.ndarray):
            return

        def fault(index: int) -> Optional[str]:
            try:
                self[index]
            except InputError as error:
                return str(error)
            return None

        with ThreadPoolExecutor() as pool:  # decoders leave Python's lock
            faults = [message for message in pool.map(fault, range(len(self))) if message]
        if faults:
            more = f' (and {len(faults) - 1} more of {len(self)} images)' if len(faults) > 1 else ''
            raise InputError(f'{faults[0]}{more}')

    def take(self, indices: Indices) -> 'ImageSet':
        """The images of these indices, in this order."""
        if isinstance(self.images, np.ndarray):
            return ImageSet(self.images[indices], self.labels[indices])
        return ImageSet([self.images[i] for i in indices], self.labels[indices], self.in_chans)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set with its splits.

    Attributes:
        name: As it stands in cards, e.g. `CIFAR-10 (JPEG)`.
        tag: As it stands in the names of weights, e.g. `cifar10`.
        classes: Class names, in the order of the labels.
        train: Training split, without the validation split.
        val: Validation split, None if there is none.
        test: Test split, None if there is none.

    Raises:
        InputError: If there are less than two classes, no training images, or labels of other classes.
    """

    name: str
    tag: str
    classes: Tuple[str, ...]
    train: ImageSet
    val: Optional[ImageSet] = None
    test: Optional[ImageSet] = None

    def __post_init__(self) -> None:
        count = len(self.classes)
        if count < 2:
            raise InputError(f'{self.name} has {count} class(es); a classifier needs at least two')
        if not len(self.train):
            raise InputError(f'{self.name} has no training images')
        for split, images in (('training', self.train), ('validation', self.val), ('test', self.test)):
            if images is None or not len(images):
                continue
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0 or high >= count:
                raise InputError(
                    f'the {split} images of {self.name} have labels from {low} to {high}; '
                    f'its {count} classes are 0 to {count - 1}')

    def with_validation_on(self, split: str) -> 'ImageData':
        """The same data with another choice of validation split.

        Args:
            split: `val` keeps the split, `test` validates on the test split and trains on train + val, `none` trains
                on train + val and validates on nothing.

        Raises:
            InputError: If `split` is none of these, or the data have no such split.
        """
        if split == 'val':
            return self
        if split not in ('test', 'none'):
            raise InputError(f"validate_on is '{split}'; it is one of val, test, none")
        if split == 'test' and self.test is None:
            raise InputError(f'{self.name} has no test split to validate on')
        train = self.train
        if self.val is not None:
            whole: Any
            if isinstance(train.images, np.ndarray):
                whole = np.concatenate([train.images, self.val.images])
            else:
                whole = [*train.images, *self.val.images]
            train = ImageSet(whole, np.concatenate([train.labels, self.val.labels]), train.in_chans)
        return dataclasses.replace(self, train=train, val=self.test if split == 'test' else None)


def load_data(
        path: Union[str, Path], in_chans: int = 3, val_share: float = 0.1, check: bool = True) -> ImageData:
    """Read a data set; its kind is told by what lies at `path`.

    Args:
        path: One of
            * a packed CIFAR-10 (`.npz` with `blob`, `offsets`, `labels`, `is_test`, `classes`);
            * a folder with torchvision's `cifar-10-batches-py`, or that folder;
            * a folder with Fashion-MNIST's `train-images-idx3-ubyte.gz` … (also unpacked, also in
              `FashionMNIST/raw`);
            * a folder of class folders of images, or one with `train`, and `val`, `test` where there are any;
            * a CSV file with the columns `path,label` and, if wanted, `split`; see `sources.load_csv`;
            * `hf:org/name`, a data set of the Hugging Face Hub; see `sources.load_hub_dataset`.
        in_chans: 1 reads the images of folders as grey, 3 as RGB. The other kinds have their own.
        val_share: Share of the images of an image folder without `val` that becomes the validation split (every
            class alike, chosen by a fixed seed).
        check: Decode every file of an image folder once, so that a damaged one is found now and not hours later.

    Raises:
        InputError: If nothing of the kind lies there, or it is damaged.
    """
    from vishub.tasks.classification.sources import HUB_PREFIX, load_csv, load_hub_dataset  # they import this module
    if str(path).startswith(HUB_PREFIX):
        return _checked(load_hub_dataset(str(path), in_chans, val_share), check)
    path = Path(path)
    if path.is_file() and path.suffix == '.npz':
        return _load_packed(path)
    if path.is_file() and path.suffix.lower() == '.csv':
        return _checked(load_csv(path, in_chans, val_share), check)
    if not path.is_dir():
        fault = 'is a file of another kind' if path.exists() else 'does not exist'
        raise InputError(f"data '{path}' {fault}; give an image folder, a torchvision folder, a .csv or an .npz file")
    for folder in (path / 'cifar-10-batches-py', path):
        if (folder / 'data_batch_1').is_file():
            return _load_cifar10(folder)
    for folder in (path / 'FashionMNIST' / 'raw', path / 'raw', path):
        if any((folder / f'train-images-idx3-ubyte{suffix}').is_file() for suffix in ('', '.gz')):
            return _load_fashion_mnist(folder)
    return _checked(_load_folder(path, in_chans, val_share), check)


def _checked(data: ImageData, check: bool) -> ImageData:
    if check:
        for images in (data.train, data.val, data.test):
            if images is not None:
                images.check()
    return data


def _with_last_as_validation(
        name: str, tag: str, classes: Sequence[str], train: ImageSet, test: ImageSet) -> ImageData:
    """Splits off the last tenth of each class's training images.

    Of each class, because the packed CIFAR-10 is sorted by class: its last 5,000 training images are all trucks.
    """
    last = []
    for label in range(len(classes)):
        of_class = np.flatnonzero(train.labels == label)
        last.append(of_class[len(of_class) - int(len(of_class) * VALIDATION_SHARE):])
    val = np.sort(np.concatenate(last))
    rest = np.setdiff1d(np.arange(len(train)), val)
    return ImageData(
        name, tag, tuple(classes), train.take(rest), train.take(val) if len(val) else None,
        test if len(test) else None)


def _load_packed(path: Path) -> ImageData:
    """CIFAR-10 packed as JPEG files in one array."""
    try:
        with np.load(path, allow_pickle=False) as file:
            blob, offsets, labels = file['blob'], file['offsets'], file['labels']
            is_test, classes = file['is_test'].astype(bool), [str(c) for c in file['classes']]
        if not len(labels) == len(is_test) == len(offsets) - 1:
            raise ValueError(f'{len(offsets) - 1} images, {len(labels)} labels, {len(is_test)} marks of the test split')
    except (KeyError, EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"'{path}' is not a packed image set: {error}") from error
    data = blob.tobytes()
    images = []
    for number, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
        try:
            with Image.open(io.BytesIO(data[start:end]), formats=('JPEG',)) as image:
                images.append(np.asarray(image.convert('RGB')))
        except (OSError, ValueError) as error:
            raise InputError(f"image {number} of '{path}' cannot be decoded: {error}") from error
        if images[-1].shape != images[0].shape:
            raise InputError(f"image {number} of '{path}' has another size than the first")
    stacked = np.stack(images)
    return _with_last_as_validation(
        'CIFAR-10 (JPEG)', 'cifar10', classes,
        ImageSet(stacked[~is_test], labels[~is_test]), ImageSet(stacked[is_test], labels[is_test]))


class _PickledArray:
    """What a pickled numpy array says of itself: shape and bytes. Calls nothing of numpy's."""

    def __init__(self, *_arguments: Any):
        self.shape: Tuple[int, ...] = ()
        self.bytes = b''

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        _version, self.shape, dtype, column_order, content = state
        if dtype.code not in ('u1', '|u1') or column_order:
            raise pickle.UnpicklingError('its array is not one of uint8 in row order')
        # Python 2 wrote bytes as text
        self.bytes = content.encode('latin1') if isinstance(content, str) else bytes(content)


class _PickledType:
    """A pickled numpy dtype, as its code."""

    def __init__(self, code: str, *_arguments: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and the like, of no meaning for single bytes


class _BatchUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's batches. Whatever a file asks for, it gets nothing but the stand-ins above."""

    ADMITTED = {
        ('numpy.core.multiarray', '_reconstruct'): _PickledArray,
        ('numpy._core.multiarray', '_reconstruct'): _PickledArray,
        ('numpy', 'ndarray'): _PickledArray,
        ('numpy', 'dtype'): _PickledType,
        ('_codecs', 'encode'): lambda text, _encoding: text.encode('latin1'),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, which no image batch needs') from None


def _read_cifar10_batch(path: Path) -> ImageSet:
    """One file of the Python version (cs.toronto.edu/~kriz/cifar.html): a row has 1024 red, green, then blue values."""
    try:
        with open(path, 'rb') as file:
            batch = _BatchUnpickler(file, encoding='latin1').load()
        array, labels = batch['data'], batch['labels']
        if len(array.shape) != 2 or array.shape[1] != 3 * 32 * 32:
            raise ValueError(f'its array has the shape {array.shape}, not (N, 3072)')
        images = np.frombuffer(array.bytes, dtype=np.uint8).reshape(array.shape[0], 3, 32, 32)
        return ImageSet(images.transpose(0, 2, 3, 1), [int(label) for label in labels])
    except Exception as error:  # damaged pickles raise anything
        raise InputError(f"'{path}' is not a batch of CIFAR-10: {error}") from error


def _load_cifar10(folder: Path) -> ImageData:
    """CIFAR-10 as torchvision stores it, without torchvision, which would let its pickles run any code."""
    batches = [_read_cifar10_batch(folder / f'data_batch_{number}') for number in range(1, 6)]
    train = ImageSet(
        np.concatenate([batch.images for batch in batches]), np.concatenate([batch.labels for batch in batches]))
    return _with_last_as_validation(
        'CIFAR-10', 'cifar10', CIFAR10_CLASSES, train, _read_cifar10_batch(folder / 'test_batch'))


def _read_idx(folder: Path, what: str, rank: int) -> np.ndarray:
    """An idx file (yann.lecun.com/exdb/mnist): magic 0, 0, 8 (uint8), rank; big-endian sizes; values."""
    path = folder / f'{what}-idx{rank}-ubyte'
    if not path.is_file():
        path = path.with_name(f'{path.name}.gz')
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            magic = struct.unpack('>HBB', file.read(4))
            if magic != (0, 8, rank):
                raise ValueError(f'its magic number is {magic}, not {(0, 8, rank)}')
            shape = struct.unpack(f'>{rank}I', file.read(4 * rank))
            values = np.frombuffer(file.read(), dtype=np.uint8)
        return values.reshape(shape).copy()
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"'{path}' is not a readable idx file: {error}") from error


def _load_fashion_mnist(folder: Path) -> ImageData:
    """Fashion-MNIST as published, 28x28 grey."""
    train, test = (
        ImageSet(
            _read_idx(folder, f'{part}-images', 3)[..., None], _read_idx(folder, f'{part}-labels', 1))
        for part in ('train', 't10k')
    )
    return _with_last_as_validation('Fashion-MNIST', 'fashion_mnist', FASHION_MNIST_CLASSES, train, test)


def _load_folder(path: Path, in_chans: int, val_share: float) -> ImageData:
    """A folder of class folders, or one of `train`, `val` (`valid`, `validation`) and `test` with class folders."""
    has_splits = (path / 'train').is_dir()
    root = path / 'train' if has_splits else path
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith('.'))
    if len(classes) < 2:
        raise InputError(f"'{root}' has {len(classes)} class folders; at least two folders of images are needed")

    def read(folder: Path) -> ImageSet:
        extra = {f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith('.')} - set(classes)
        if extra:
            raise InputError(f"'{folder}' has classes that '{root}' has not: {', '.join(sorted(extra))}")
        files: List[Path] = []
        labels: List[int] = []
        for label, name in enumerate(classes):
            if not (folder / name).is_dir():
                continue  # val and test may lack a class
            found = images_in(folder / name)
            files += found
            labels += [label] * len(found)
        if not files:
            raise InputError(f"'{folder}' has no class folders of images")
        return ImageSet(files, labels, in_chans)

    name = path.resolve().name
    tag = ''.join(c if c.isalnum() else '_' for c in name.lower())
    train = read(root)
    val_folder = next((path / n for n in ('val', 'valid', 'validation') if has_splits and (path / n).is_dir()), None)
    test = read(path / 'test') if has_splits and (path / 'test').is_dir() else None
    if val_folder is not None:
        return ImageData(name, tag, tuple(classes), train, read(val_folder), test)
    return with_validation_of_each_class(name, tag, classes, train, test, val_share)


def with_validation_of_each_class(
        name: str, tag: str, classes: Sequence[str], train: ImageSet, test: Optional[ImageSet],
        val_share: float) -> ImageData:
    """Splits a share of each class's training images off as validation split, chosen by a fixed seed."""
    chosen = []
    for label in range(len(classes)):
        of_class = np.flatnonzero(train.labels == label)
        chosen.append(np.random.default_rng([0, label]).permutation(of_class)[:int(len(of_class) * val_share)])
    val = np.sort(np.concatenate(chosen))
    rest = np.setdiff1d(np.arange(len(train)), val)
    return ImageData(name, tag, tuple(classes), train.take(rest), train.take(val) if len(val) else None, test)


class AugmentedSet(Dataset):
    """Training samples: `(image uint8 (C, H, W), label)` as a pure function of (seed, epoch, index, side).

    Args:
        images: The images.
        policy: Name of the augmentation, or path of a file that describes it.
        seed: Seed of the augmentation.
    """

    def __init__(self, images: ImageSet, policy: str, seed: int = 0):
        check_policy(policy)
        self.images, self.policy, self.seed = images, policy, seed
        self._augmentations: Dict[int, Augmentation] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Tuple[torch.Tensor, int]:
        epoch, index, side = key
        native = self.images.native_side
        if side not in self._augmentations:
            self._augmentations[side] = make_augmentation(self.policy, native or (side, side), native is not None)
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch, index]))
        image = self._augmentations[side](self.images[index], generator)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), int(self.images.labels[index])
