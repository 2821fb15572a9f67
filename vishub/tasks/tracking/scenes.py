"""Scenes made on the fly, in which a target changes its looks while it moves: exact boxes, any number of frames.

A window pans over a background. The target and three distractors drift on slow sinusoids, breathe in size, and cross
each other; the target's texture fades into another one and back, so that a template of the first frame goes stale.
Backgrounds and textures are cut from photographs; without any, they are smooth noise and colour grids.
"""
import math
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from vishub.errors import InputError
from vishub.tasks.images import decode_image, images_in

__all__ = ['NoiseTextures', 'PhotoTextures', 'Scene', 'Textures', 'find_photos']

_TEXTURE = 32  # side of a stored texture
_FADE = 80  # frames from one texture to the other
_MOST_PHOTOS, _LONGEST = 400, 640  # photographs kept, and their longer side


class Textures(Protocol):
    """Where pictures come from; all are uint8 RGB."""

    def background(self, rng: np.random.Generator, side: int) -> np.ndarray:
        """(side, side, 3)."""

    def texture(self, rng: np.random.Generator) -> np.ndarray:
        """(32, 32, 3)."""


class NoiseTextures:
    """Backgrounds of smooth noise (grids of 8 and 40 cells, enlarged), textures of 4 x 4 random colours."""

    name = 'noise'

    def background(self, rng: np.random.Generator, side: int) -> np.ndarray:
        coarse, fine = (_enlarged(rng.integers(0, 256, (cells, cells, 3), np.uint8), side) for cells in (8, 40))
        return (0.6 * coarse + 0.4 * fine).astype(np.uint8)

    def texture(self, rng: np.random.Generator) -> np.ndarray:
        return _enlarged(rng.integers(0, 256, (4, 4, 3), np.uint8), _TEXTURE)


class PhotoTextures:
    """Backgrounds and textures cut from photographs, which are kept in memory.

    Args:
        files: Pictures; 400 of them at most are used, evenly spread, scaled to 640 pixels.
        name: What they are, for cards.

    Raises:
        InputError: If there is none, or one cannot be read.
    """

    def __init__(self, files: Sequence[Union[str, Path]], name: str = 'photographs'):
        if not files:
            raise InputError('there are no photographs to cut scenes from')
        chosen = np.linspace(0, len(files) - 1, min(len(files), _MOST_PHOTOS)).round().astype(int)
        self.name, self.photos = name, [_small_photo(files[place]) for place in chosen]

    def background(self, rng: np.random.Generator, side: int) -> np.ndarray:
        photo = self.photos[rng.integers(len(self.photos))]
        shortest = min(photo.shape[:2])
        part = int(rng.uniform(min(side, shortest), shortest + 1))
        cut = _cut(photo, part, rng)
        if rng.random() < 0.5:
            cut = cut[:, ::-1]
        return np.asarray(Image.fromarray(np.ascontiguousarray(cut)).resize((side, side), Image.Resampling.BILINEAR))

    def texture(self, rng: np.random.Generator) -> np.ndarray:
        """The most varied of three places, for sky looks like sky; with colours of its own."""
        best, spread = None, -1.
        for _ in range(3):
            photo = self.photos[rng.integers(len(self.photos))]
            cut = _cut(photo, min(int(rng.integers(16, 97)), *photo.shape[:2]), rng)
            if (found := float(cut[::4, ::4].std())) > spread:
                best, spread = cut, found
        assert best is not None
        small = Image.fromarray(np.ascontiguousarray(best)).resize((_TEXTURE, _TEXTURE), Image.Resampling.BILINEAR)
        gains = rng.uniform(0.6, 1.4, 3)
        return (np.asarray(small) * gains).clip(0, 255).astype(np.uint8)


class _Wave(NamedTuple):
    middle: float
    amplitude: float
    period: float  # frames
    phase: float

    def at(self, time: float) -> float:
        return self.middle + self.amplitude * math.sin(2 * math.pi * time / self.period + self.phase)


class _Sprite(NamedTuple):
    """Something that moves: RGBA textures (2, 32, 32, 4) float32, which fade into each other from `fade` on."""
    textures: np.ndarray
    width: float
    height: float
    x: _Wave  # of its centre
    y: _Wave
    size: _Wave  # factor on width and height
    fade: float

    def box(self, time: float) -> Tuple[int, int, int, int]:
        """The pixels that it covers: x, y, w, h."""
        factor = self.size.at(time)
        w, h = max(4, round(self.width * factor)), max(4, round(self.height * factor))
        return round(self.x.at(time) - w / 2), round(self.y.at(time) - h / 2), w, h

    def draw(self, canvas: Image.Image, time: float) -> None:
        x, y, w, h = self.box(time)
        share = abs((((time + self.fade) / _FADE) + 1) % 2 - 1)  # 0, up to 1 after 80 frames, back to 0 after 160
        mixed = (1 - share) * self.textures[0] + share * self.textures[1]
        sprite = Image.fromarray(mixed.astype(np.uint8)).resize((w, h), Image.Resampling.BILINEAR)
        canvas.paste(sprite, (x, y), sprite)


class Scene:
    """One scene; nothing is drawn before it is asked for.

    Args:
        textures: Where its pictures come from.
        seed: All that decides the scene besides.
        length: Frames.
        side: Of a frame, in pixels.
        fade: How far the target's change of looks has gone in the first frame, in frames (80 is all the way); any,
            if None.

    Attributes:
        name: For results.
    """

    def __init__(
            self,
            textures: Textures,
            seed: Sequence[int],
            length: int = 100,
            side: int = 128,
            fade: Optional[float] = 0.,
            name: str = 'scene',
    ):
        rng = np.random.default_rng(list(seed))
        self.length, self.side, self.name = length, side, name
        room = side // 8
        self._background = textures.background(rng, side + 2 * room)
        self._pan = [_wave(rng, room, rng.uniform(0, 1) * room, 100, 400) for _ in range(2)]
        self._sprites = [_sprite(textures, rng, side) for _ in range(4)]
        self._target = self._sprites[0]._replace(fade=rng.uniform(0, 2 * _FADE) if fade is None else fade)
        self._sprites[0] = self._target
        self._order = rng.permutation(4)  # who lies over whom

    def __len__(self) -> int:
        return self.length

    def box(self, number: int) -> np.ndarray:
        """x, y, w, h of the target in a frame: the pixels that it covers."""
        return np.array(self._target.box(number), np.float64)

    def frame(self, number: int) -> np.ndarray:
        """uint8 (side, side, 3)."""
        left, top = (round(wave.at(number)) for wave in self._pan)
        window = self._background[top:top + self.side, left:left + self.side]
        canvas = Image.fromarray(np.ascontiguousarray(window))
        for place in self._order:
            self._sprites[place].draw(canvas, number)
        return np.asarray(canvas)


def find_photos(folder: Union[str, Path]) -> Dict[str, List[Path]]:
    """Photographs of a folder by split: those of its folders train, val and test; or, of all, 70, 10 and 20 %."""
    folder = Path(folder)
    splits = ('train', 'val', 'test')
    if all((folder / split).is_dir() for split in splits):
        return {split: images_in(folder / split) for split in splits}
    files = images_in(folder)
    if len(files) < 3:
        raise InputError(f"'{folder}' has {len(files)} photographs: three splits need three at least")
    first, second = max(1, round(0.7 * len(files))), max(2, round(0.8 * len(files)))
    second = min(second, len(files) - 1)
    first = min(first, second - 1)
    return {'train': files[:first], 'val': files[first:second], 'test': files[second:]}


def _small_photo(file: Union[str, Path]) -> np.ndarray:
    image = decode_image(file).image
    if max(image.size) > _LONGEST:
        image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _cut(photo: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    top, left = (int(rng.integers(extent - side + 1)) for extent in photo.shape[:2])
    return photo[top:top + side, left:left + side]


def _enlarged(grid: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))


def _wave(rng: np.random.Generator, middle: float, amplitude: float, shortest: float, longest: float) -> _Wave:
    return _Wave(middle, amplitude, rng.uniform(shortest, longest), rng.uniform(0, 2 * math.pi))


def _sprite(textures: Textures, rng: np.random.Generator, side: int) -> _Sprite:
    width, height = rng.uniform(12, 26, 2) * side / 128
    paths = []
    for _ in range(2):
        middle = rng.uniform(0.3, 0.7) * side
        amplitude = rng.uniform(0.3, 1.) * (min(middle, side - middle) - 0.1 * side)
        paths.append(_wave(rng, middle, amplitude, 80, 240))
    # super-ellipse with a soft edge
    power = rng.uniform(2, 8)
    place = np.abs((np.arange(_TEXTURE) + 0.5) / (_TEXTURE / 2) - 1)
    radius = (place[:, None] ** power + place[None] ** power) ** (1 / power)
    alpha = 255 * ((1 - radius) * 12).clip(0, 1)
    colours = np.stack([textures.texture(rng) for _ in range(2)]).astype(np.float32)
    rgba = np.concatenate([colours, np.broadcast_to(alpha[None, :, :, None], (2, *alpha.shape, 1))], axis=3)
    return _Sprite(
        rgba.astype(np.float32), width, height, paths[0], paths[1], size=_wave(rng, 1., 0.25, 50, 120),
        fade=rng.uniform(0, 2 * _FADE))
