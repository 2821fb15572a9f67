"""Procedural slides: real pyramidal TIFF files of invented tissue with planted lesions, whose place is known exactly.

Four organs (tasks) of two classes each. The tissue is real: haematoxylin and DAB of the immunohistochemistry picture
that comes with scikit-image (`skimage.data.immunohistochemistry`, by the Center for Microscopy and Molecular Imaging,
no known copyright restrictions) are separated, cropped, turned, scaled, and stained anew with the organ's own
haematoxylin and eosin. The lesions are drawn: each class has nuclei of its own size, shape and arrangement. A slide
says its class by its lesions alone; the tissue around tells only the organ.

This is a test bench for the software and for forgetting. It has no diagnostic meaning.

A slide is a pure function of (seed, organ, class, split, number).
"""
import functools
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import numpy as np

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path

__all__ = ['CELL', 'LESION', 'MPP', 'ORGANS', 'PATCH', 'draw_slide', 'make_slides', 'write_pyramid']

MPP = 0.5  # micrometres a pixel
PATCH, CELL, LESION = 16, 128, 64  # pixels: patch, region of 8 x 8 patches, lesion of 4 x 4 patches
_LESION_SHARE = 0.35  # of the regions
_BACKGROUND = 243
_LEVELS = 4
_LEAST_SIDE = 6 * CELL  # 14 regions have to find room inside the margin of one

# Optical densities (R, G, B) of unit concentration: Ruifrok and Johnston 2001.
_HAEMATOXYLIN, _EOSIN, _DAB = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)


@dataclass(frozen=True)
class Lesion:
    """How the nuclei of a lesion look.

    Attributes:
        radius: Of a nucleus, pixels.
        spacing: Between nuclei, pixels.
        arrangement: `scattered`, `rings`, `rows` or `clumps`.
        stretch: Length of a nucleus relative to its width.
        nuclei: Concentration of haematoxylin in them.
        ground: Concentration of eosin between them.
    """
    radius: float
    spacing: float
    arrangement: str
    stretch: float = 1.
    nuclei: float = 1.1
    ground: float = 0.35


@dataclass(frozen=True)
class Organ:
    """One task.

    Attributes:
        haematoxylin, eosin: Strengths of the two stains in its healthy tissue.
        zoom: Scale of the tissue picture.
        tint: Share, -1 to 1, by which both stains' vectors lean to red (positive) or blue.
        classes: Name -> lesion, in the order of the class numbers.
    """
    haematoxylin: float
    eosin: float
    zoom: float
    tint: float
    classes: Dict[str, Lesion]


ORGANS: Dict[str, Organ] = {
    'organ_a': Organ(0.7, 0.45, 1.0, 0.0, {
        'rings': Lesion(2.2, 20, 'rings', ground=0.2), 'rows': Lesion(2.2, 9, 'rows', ground=0.75)}),
    'organ_b': Organ(0.5, 0.75, 1.6, -0.5, {
        'clumps': Lesion(3.0, 7, 'clumps', nuclei=1.5), 'lakes': Lesion(7.0, 18, 'scattered', nuclei=0., ground=0.9)}),
    'organ_c': Organ(0.9, 0.3, 0.7, 0.4, {
        'giants': Lesion(5.5, 15, 'scattered', nuclei=1.3), 'dust': Lesion(1.0, 4, 'scattered', nuclei=1.6)}),
    'organ_d': Organ(0.6, 0.6, 1.25, 0.9, {
        'spindles': Lesion(1.3, 7, 'scattered', stretch=5., nuclei=1.4, ground=0.1),
        'pale': Lesion(1.6, 14, 'scattered', nuclei=0.5, ground=0.08)}),
}


def _generator(*words: Any) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(str(word).encode()) for word in words])


@functools.lru_cache(maxsize=1)
def _tissue() -> np.ndarray:
    """Concentrations (2, 512, 512) of haematoxylin and of what DAB marks, in the real picture, 0 to about 1.5."""
    skimage: Any = import_extra('skimage.data', 'slides')
    density = -np.log10((skimage.immunohistochemistry().astype(np.float32) + 1) / 256)
    vectors = np.array([_HAEMATOXYLIN, _DAB], np.float32)
    concentrations = density.reshape(-1, 3) @ np.linalg.pinv(vectors)
    return concentrations.clip(0, 1.5).T.reshape(2, 512, 512)


def _texture(rng: np.random.Generator, height: int, width: int, zoom: float) -> np.ndarray:
    """Tissue (2, height, width): a crop of the real picture, turned, scaled, and continued by reflection."""
    from PIL import Image

    channels = np.rot90(_tissue(), int(rng.integers(4)), axes=(1, 2))
    if rng.random() < 0.5:
        channels = channels[:, ::-1]
    scaled = round(512 * zoom * rng.uniform(0.9, 1.1))
    maps = [np.asarray(Image.fromarray(np.ascontiguousarray(c)).resize((scaled, scaled), Image.Resampling.BILINEAR))
            for c in channels]
    # crop from a random place; beyond the edge the picture is reflected
    rows, columns = (
        np.abs((int(rng.integers(scaled)) + np.arange(length) + scaled) % (2 * scaled) - scaled).clip(max=scaled - 1)
        for length in (height, width))
    return np.stack(maps)[:, rows[:, None], columns]


def _smooth_noise(rng: np.random.Generator, height: int, width: int, grain: int) -> np.ndarray:
    """(height, width) in about [0, 1], without edges finer than `grain` pixels."""
    from PIL import Image

    coarse = Image.fromarray(rng.random((height // grain + 2, width // grain + 2), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _draw_lesion(rng: np.random.Generator, lesion: Lesion, side: int) -> np.ndarray:
    """Concentrations (2, side, side) of haematoxylin and eosin."""
    yy, xx = np.mgrid[:side, :side].astype(np.float32)
    if lesion.arrangement == 'rings':
        centres = []
        for cy in np.arange(0, side + 1, lesion.spacing):
            for cx in np.arange(0, side + 1, lesion.spacing):
                jitter = rng.uniform(-2, 2, 2)
                for angle in np.arange(0, 2 * math.pi, math.pi / 4):
                    centres.append((cy + jitter[0] + 7 * math.sin(angle), cx + jitter[1] + 7 * math.cos(angle)))
    elif lesion.arrangement == 'rows':
        step = lesion.radius * 2.1
        centres = [(y, x + rng.uniform(-0.4, 0.4)) for y in np.arange(2, side, lesion.spacing)
                   for x in np.arange(0, side, step)]
    else:
        count = round((side / lesion.spacing) ** 2 * 1.3)
        centres = [tuple(point) for point in rng.uniform(0, side, (count, 2))]
        if lesion.arrangement == 'clumps':
            hubs = rng.uniform(0, side, (max(3, count // 10), 2))
            centres = [tuple(hubs[int(rng.integers(len(hubs)))] + rng.normal(0, 6, 2)) for _ in range(2 * count)]
    nuclei = np.zeros((side, side), np.float32)
    direction = float(rng.uniform(0, math.pi))  # of long nuclei: those of one lesion lie alike
    for cy, cx in centres:
        turn = direction + float(rng.normal(0, 0.2))
        along = (xx - cx) * math.cos(turn) + (yy - cy) * math.sin(turn)
        across = -(xx - cx) * math.sin(turn) + (yy - cy) * math.cos(turn)
        radius = lesion.radius * rng.uniform(0.85, 1.15)
        distance = np.hypot(along / lesion.stretch, across) / radius
        nuclei = np.maximum(nuclei, np.clip(2.2 - 2 * distance, 0, 1))
    ground = lesion.ground * (0.85 + 0.3 * _smooth_noise(rng, side, side, 8))
    return np.stack([0.85 * lesion.nuclei * nuclei, ground * (1 - nuclei)])


def _blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side), 1 inside a round shape with an uneven edge, falling to 0 at the border."""
    yy, xx = (np.mgrid[:side, :side] - (side - 1) / 2) / (side / 2)
    distance = (np.abs(xx) ** 3 + np.abs(yy) ** 3) ** (1 / 3) + 0.25 * (_smooth_noise(rng, side, side, 12) - 0.5)
    return ((0.95 - distance) * 8).clip(0, 1).astype(np.float32)


def _regions(rng: np.random.Generator, cells: int, count: int) -> List[Tuple[int, int]]:
    """`count` connected cells (row, column) of a cells x cells grid, its margin left out."""
    grown = [(cells // 2, cells // 2)]
    while len(grown) < count:
        row, column = grown[int(rng.integers(len(grown)))]
        step = ((0, 1), (1, 0), (0, -1), (-1, 0))[int(rng.integers(4))]
        new = (row + step[0], column + step[1])
        if new not in grown and all(1 <= place < cells - 1 for place in new):
            grown.append(new)
    return sorted(grown)


def draw_slide(
        organ: str,
        label: str,
        number: int = 0,
        split: str = 'train',
        seed: int = 0,
        side: int = 1024,
) -> Tuple[np.ndarray, List[Tuple[int, int, int, int]]]:
    """Draw one slide.

    Args:
        organ, label: Keys of `ORGANS` and of its `classes`.
        number, split, seed: What makes this slide another than the next.
        side: Pixels, a multiple of 128, at least 768.

    Returns:
        uint8 (side, side, 3), and the lesions as (left, top, width, height) in pixels.

    Raises:
        InputError: If the side is another.
    """
    if side < _LEAST_SIDE or side % CELL:
        raise InputError(f'a slide of {side} pixels cannot be drawn: its side is a multiple of {CELL}, from '
                         f'{_LEAST_SIDE} on')
    rng = _generator(seed, organ, label, split, number)
    kind = ORGANS[organ]
    cells = np.array(_regions(rng, side // CELL, int(rng.integers(6, 15))))
    # all is drawn in the box of the tissue alone, with a margin for its frayed edges
    top, left = (max(0, CELL * int(cells[:, axis].min()) - 32) for axis in (0, 1))
    height, width = (
        min(side, CELL * int(cells[:, axis].max()) + CELL + 32) - start for axis, start in ((0, top), (1, left)))
    inside = np.zeros((height, width), np.float32)
    for row, column in cells * CELL - (top, left):
        inside[row:row + CELL, column:column + CELL] = 1
    # the cells' outline, displaced by smooth noise of up to 24 pixels
    yy, xx = np.mgrid[:height, :width]
    moved = [
        (grid + 48 * (_smooth_noise(rng, height, width, 40) - 0.5)).astype(int).clip(0, length - 1)
        for grid, length in ((yy, height), (xx, width))]
    inside = inside[moved[0], moved[1]]

    tissue = _texture(rng, height, width, kind.zoom)
    strength = rng.normal(1, 0.07, 2).clip(0.8, 1.2).astype(np.float32)  # no two slides are stained alike
    maps = np.stack([
        kind.haematoxylin * (tissue[0] + 0.25 * tissue[1]) * strength[0],
        kind.eosin * (0.3 + tissue[1]) * strength[1]])
    lesions = []
    for place in sorted(rng.permutation(len(cells))[:max(2, round(_LESION_SHARE * len(cells)))].tolist()):
        y, x = (CELL * int(cells[place, axis]) + PATCH * int(rng.integers(1, 4)) for axis in (0, 1))
        weight = _blob(rng, LESION)
        box = (slice(y - top, y - top + LESION), slice(x - left, x - left + LESION))
        drawn = _draw_lesion(rng, kind.classes[label], LESION) * strength[:, None, None]
        place_of = (slice(None), *box)
        maps[place_of] = weight * drawn + (1 - weight) * maps[place_of]
        inside[box] = np.maximum(inside[box], weight)
        lesions.append((x, y, LESION, LESION))

    lean = np.array([-kind.tint, 0., kind.tint], np.float32) * 0.12
    vectors = np.stack([np.array(_HAEMATOXYLIN, np.float32) + lean, np.array(_EOSIN, np.float32) + lean])
    density = np.tensordot(np.moveaxis(maps * inside, 0, 2), vectors, 1)  # height, width, RGB
    grain = np.float32(rng.normal(0, 2, density.shape)) * inside[..., None]
    picture = np.full((side, side, 3), _BACKGROUND, np.uint8)
    picture[top:top + height, left:left + width] = (
        _BACKGROUND * np.exp(-math.log(10) * density) + grain).clip(0, 255)
    return picture, lesions


def write_pyramid(
        path: Union[str, Path], pixels: np.ndarray, mpp: Optional[float] = MPP, levels: int = _LEVELS) -> Path:
    """Write a tiled pyramidal TIFF that OpenSlide opens, whole or not at all.

    Args:
        path: Ends in .tif, .tiff or .svs (then also the Aperio header, with which vendor and power are known).
        pixels: uint8 (H, W, 3), level 0.
        mpp: Micrometres a pixel of level 0; None writes no resolution.
        levels: Each has half the side of the one before.
    """
    from PIL import Image

    tifffile = import_extra('tifffile', 'slides')
    path = Path(path)
    image = Image.fromarray(pixels)
    is_aperio = path.suffix.lower() == '.svs'
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        for level in range(levels):
            size = (max(1, image.width >> level), max(1, image.height >> level))
            options: Dict[str, Any] = {'subfiletype': 1} if level else {}
            if mpp is not None:
                per_cm = 1e4 / (mpp * 2 ** level)
                options.update(resolution=(per_cm, per_cm), resolutionunit='CENTIMETER')
            if is_aperio:
                options['description'] = (
                    f'Aperio Image Library v11.0\r\n{size[0]}x{size[1]}'
                    + (f' |AppMag = {10 / mpp:g}|MPP = {mpp:.4f}' if mpp is not None else ''))
            tiff.write(
                np.asarray(image.resize(size, Image.Resampling.BOX)), tile=(256, 256), photometric='rgb',
                compression='deflate', compressionargs={'level': 4}, metadata=None, **options)
            if is_aperio and level == 0:
                small = image.resize((max(1, size[0] // 8), max(1, size[1] // 8)), Image.Resampling.BOX)
                tiff.write(np.asarray(small), photometric='rgb', metadata=None,
                           description=f'Aperio Image Library v11.0\r\nthumbnail {small.width}x{small.height}')
    return path


def lesions_geojson(label: str, lesions: List[Tuple[int, int, int, int]]) -> Dict[str, Any]:
    """Lesions as annotations that QuPath opens, in level-0 pixels."""
    def ring(left: int, top: int, width: int, height: int) -> List[List[int]]:
        right, bottom = left + width, top + height
        return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]

    return {'type': 'FeatureCollection', 'features': [
        {'type': 'Feature', 'geometry': {'type': 'Polygon', 'coordinates': [ring(*box)]},
         'properties': {'objectType': 'annotation', 'classification': {'name': label}}}
        for box in lesions]}


def make_slides(
        folder: Union[str, Path],
        train: int = 30,
        test: int = 15,
        seed: int = 0,
        progress: Optional[Callable[[int, int], None]] = None,
) -> List[Path]:
    """Write the whole set: FOLDER/<organ>/<train|test>/<class>/<number>.tif, each with its lesions as .geojson.

    What is there already stays, so that a broken off call can be repeated.

    Args:
        folder: Where to.
        train, test: Slides a class.
        seed: Of all slides.
        progress: Called with (slides done, slides in all).

    Returns:
        The organs' folders, the tasks in their order.
    """
    folder = Path(folder)
    wanted = [
        (organ, split, label, number) for organ, kind in ORGANS.items() for split, count in
        (('train', train), ('test', test)) for label in kind.classes for number in range(count)]
    for done, (organ, split, label, number) in enumerate(wanted):
        if progress is not None:
            progress(done, len(wanted))
        path = folder / organ / split / label / f'{number:03d}.tif'
        if path.exists():
            continue
        pixels, lesions = draw_slide(organ, label, number, split, seed)
        with atomic_path(path.with_suffix('.geojson')) as temporary:
            temporary.write_text(json.dumps(lesions_geojson(label, lesions)), encoding='utf-8')
        write_pyramid(path, pixels)
    if progress is not None:
        progress(len(wanted), len(wanted))
    return [folder / organ for organ in ORGANS]
