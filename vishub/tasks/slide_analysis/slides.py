"""Opening whole-slide images, and reading any rectangle of one at any scale in constant memory.

OpenSlide reads them, or TiffSlide where that is not installed; both have the same interface. Coordinates are pixels of
level 0, the finest.
"""
import contextlib
import importlib
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import numpy as np
from PIL import Image

from vishub.errors import InputError, MissingExtraError

__all__ = ['Slide', 'open_slide']

_WHITE = (255, 255, 255)
# A file with one level is read at full size for every view of it: fine up to here, hopeless beyond.
_MOST_PIXELS_OF_ONE_LEVEL = 100_000_000
_STRIP_PIXELS = 16_000_000  # level pixels read at once


class Slide:
    """An open slide; close it, or use it in a `with` block. Not to be shared by threads.

    Attributes:
        path: As given.
        width, height: Pixels of level 0.
        mpp: Micrometres a pixel of level 0; None for a plain picture that came without.
        vendor: Format, e.g. `aperio`; `picture` for a plain one.
        downsamples: Of the levels, the first is 1.
        warnings: What was guessed, one sentence each.
    """

    def __init__(self, handle: Any, path: str, mpp: Optional[float], vendor: str, warnings: Tuple[str, ...] = ()):
        self._handle = handle
        self.path, self.mpp, self.vendor, self.warnings = path, mpp, vendor, warnings
        self.width, self.height = handle.dimensions
        self.downsamples: List[float] = list(handle.level_downsamples)

    def __enter__(self) -> 'Slide':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        self._handle.close()

    def read(self, x: int, y: int, width: int, height: int, size: Tuple[int, int]) -> np.ndarray:
        """A rectangle, scaled.

        Read from the coarsest level that is fine enough, then averaged down to the exact size. What the file has no
        pixels for, inside or beyond its border, is white. A large rectangle is read in strips.

        Args:
            x, y, width, height: Level-0 pixels; may reach beyond the slide.
            size: Width and height of the result.

        Returns:
            uint8 (size[1], size[0], 3), RGB.

        Raises:
            InputError: If the file cannot be read there: damaged or truncated.
        """
        # 1 % more, because levels are rounded: 8.003 serves where 8 is wanted
        wanted = max(1., 1.01 * min(width / size[0], height / size[1]))
        level = self._handle.get_best_level_for_downsample(wanted)
        downsample = self.downsamples[level]
        columns = max(1, math.ceil(width / downsample))
        most = max(1, _STRIP_PIXELS // columns)  # rows of the level at once
        rows = max(1, math.ceil(height / downsample))
        if rows <= most:
            return self._scaled(self._region(x, y, level, columns, rows), size)
        strips = -(-rows // most)
        edges = np.linspace(0, size[1], min(strips, size[1]) + 1).round().astype(int)
        scale = height / size[1]
        return np.concatenate([
            self._scaled(
                self._region(
                    x, y + round(top * scale), level, columns, max(1, round((bottom - top) * scale / downsample))),
                (size[0], int(bottom - top)))
            for top, bottom in zip(edges[:-1], edges[1:])])

    def thumbnail(self, downsample: float) -> np.ndarray:
        """The whole slide, uint8 (H, W, 3), smaller by `downsample`; its sides are rounded up, beyond them is white."""
        size = (math.ceil(self.width / downsample), math.ceil(self.height / downsample))
        return self.read(0, 0, round(size[0] * downsample), round(size[1] * downsample), size)

    def label(self) -> str:
        """File name, for the user."""
        return os.path.basename(self.path)

    def _region(self, x: int, y: int, level: int, columns: int, rows: int) -> Image.Image:
        with _faults(self.path):
            rgba = self._handle.read_region((int(x), int(y)), level, (columns, rows))
        image = Image.new('RGB', rgba.size, _WHITE)
        image.paste(rgba, mask=rgba.getchannel('A') if rgba.mode == 'RGBA' else None)
        return image

    @staticmethod
    def _scaled(image: Image.Image, size: Tuple[int, int]) -> np.ndarray:
        shrinks = image.width >= size[0] and image.height >= size[1]
        method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        return np.asarray(image if image.size == size else image.resize(size, method))


def open_slide(
        path: Union[str, os.PathLike],
        mpp: Optional[float] = None,
        allow_image: bool = False,
) -> Slide:
    """Open a whole-slide image.

    Args:
        path: A file that OpenSlide or TiffSlide reads: .svs, .tif, .ndpi, .mrxs, .scn, .vms …
        mpp: Micrometres a pixel of level 0; overrides what the file says.
        allow_image: Take a plain picture (PNG, JPEG, TIFF without levels) for a slide.

    Raises:
        InputError: If there is no such file, it is no slide or damaged, says no resolution, or has so large a single
            level that it cannot be looked at.
        MissingExtraError: If neither reader is installed.
    """
    name = str(path)
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise InputError(f'mpp is {mpp}: give micrometres a pixel, as in 0.5')
    if not os.path.exists(name):
        raise InputError(f"'{name}' does not exist: give the path of a slide")
    if os.path.isdir(name):
        raise InputError(f"'{name}' is a folder: give a slide file such as .svs or .tif")
    reader = _reader()
    with _faults(name):
        vendor = reader.OpenSlide.detect_format(name)
    if vendor is None:
        if not allow_image:
            raise InputError(
                f"'{name}' is not a whole-slide image; pass allow_image=True to tile a plain image, or give a slide "
                'such as .svs or a tiled, pyramidal .tif')
        handle, vendor = _open_picture(reader, name), 'picture'
    else:
        with _faults(name):
            handle = reader.OpenSlide(name)
    try:
        return _described(handle, name, mpp, vendor)
    except BaseException:
        handle.close()
        raise


def _described(handle: Any, name: str, mpp: Optional[float], vendor: str) -> Slide:
    properties: Dict[str, str] = dict(handle.properties)
    warnings: List[str] = []
    if mpp is None:
        mpp = _resolution(properties)
    if mpp is None:
        raise InputError(f"'{name}' says no resolution (micrometres a pixel, or power of the objective); pass mpp=, "
                         'such as 0.5 for 20x or 0.25 for 40x')
    slide = Slide(handle, name, mpp, vendor)
    if len(slide.downsamples) == 1:
        pixels = slide.width * slide.height
        if pixels > _MOST_PIXELS_OF_ONE_LEVEL:
            raise InputError(
                f"'{name}' has no pyramid levels but one of {slide.width:,} x {slide.height:,} pixels, which would be "
                'read whole for every overview: convert it, e.g. with '
                '`vips tiffsave slide.tif pyramid.tif --tile --pyramid --compression jpeg`')
        if vendor != 'picture':
            warnings.append('the file has no pyramid levels: overviews are made from full size')
    slide.warnings = tuple(warnings)
    return slide


def _resolution(properties: Dict[str, str]) -> Optional[float]:
    """Micrometres a pixel, from what the file says of itself; None if it says nothing usable."""
    for prefix in ('openslide', 'tiffslide'):
        for key, power in ((f'{prefix}.mpp-x', False), (f'{prefix}.objective-power', True)):
            try:
                value = float(properties.get(key) or 'nan')
            except ValueError:
                continue
            if math.isfinite(value) and value > 0:
                return 10 / value if power else value
    return None


def _reader() -> Any:
    """The module that reads slides, with OpenSlide's interface."""
    for module, name in (('openslide', 'OpenSlide'), ('tiffslide', 'TiffSlide')):
        try:
            found = importlib.import_module(module)
        except ImportError:  # also where the Python part is there and the library is not
            continue
        if name == 'TiffSlide':
            return _TiffSlideAsOpenSlide(found)
        return found
    raise MissingExtraError(
        "no reader of slides is installed: pip install 'vishub[slides]' (or openslide-python openslide-bin, or "
        'tiffslide)')


class _TiffSlideAsOpenSlide:
    """TiffSlide under OpenSlide's names."""

    def __init__(self, module: Any):
        self.OpenSlide = module.TiffSlide
        self.ImageSlide = None


def _open_picture(reader: Any, name: str) -> Any:
    if reader.ImageSlide is None:
        raise InputError(f"'{name}' is a plain image, which TiffSlide cannot tile: pip install openslide-python "
                         'openslide-bin')
    try:
        return reader.ImageSlide(name)
    except Image.DecompressionBombError as error:
        raise InputError(f"'{name}' is too large for a plain image ({error}): give a pyramidal slide") from error
    except Exception as error:  # Pillow's decoders raise what they like
        raise InputError(f"'{name}' is neither a slide nor a picture: {error}") from error


@contextlib.contextmanager
def _faults(name: str) -> Iterator[None]:
    """What readers raise, as one sentence."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except PermissionError as error:
        raise InputError(f"'{name}' cannot be read: {error.strerror or error}") from error
    except Exception as error:  # OpenSlideError, tifffile's and zarr's own, OSError of a truncated picture
        raise InputError(f"'{name}' is damaged or truncated: {type(error).__name__}: {error}") from error


def is_slide_name(path: Union[str, Path]) -> bool:
    """Whether a file name ends as slides do; which it is, only opening tells."""
    return Path(path).suffix.lower() in (
        '.svs', '.tif', '.tiff', '.ndpi', '.mrxs', '.scn', '.vms', '.vmu', '.bif', '.svslide', '.czi', '.dcm')
