"""Where the tissue of a slide is, and the regions and patches that it is cut into."""
import math
from dataclasses import dataclass
from typing import Optional

import numpy as np

from vishub.errors import InputError, import_extra
from vishub.tasks.slide_analysis.slides import Slide

__all__ = ['Regions', 'Tissue', 'Tiling', 'find_tissue', 'make_regions']

_MOST_PIXELS = 4_000_000  # of the overview
_FEWEST_PIXELS = 256  # a side, where the slide has as many


@dataclass(frozen=True)
class Tiling:
    """How slides are cut.

    Attributes:
        patch_size: Side of a patch, pixels at `mpp`.
        grid: Patches a side of a region.
        mpp: Micrometres a pixel; 0.5 is what is called 20x.
        min_tissue: Share of a region (of its part inside the slide) that must be tissue, 0 to 1.
        max_regions: Keep at most so many, those with most tissue; None keeps all.
    """
    patch_size: int = 512
    grid: int = 8
    mpp: float = 0.5
    min_tissue: float = 0.05
    max_regions: Optional[int] = None

    def __post_init__(self) -> None:
        for name in ('patch_size', 'grid', 'mpp'):
            if not getattr(self, name) > 0:
                raise InputError(f'{name} is {getattr(self, name)}: it must be greater than 0')
        if not 0 <= self.min_tissue <= 1:
            raise InputError(f'min_tissue is {self.min_tissue}: it is a share, 0 to 1')
        if self.max_regions is not None and self.max_regions < 1:
            raise InputError(f'max_regions is {self.max_regions}: give 1 or more, or leave it out')

    def factor(self, slide: Slide) -> float:
        """Level-0 pixels for one at `mpp`."""
        assert slide.mpp is not None
        return self.mpp / slide.mpp


@dataclass(frozen=True, eq=False)
class Tissue:
    """Attributes:
        mask: bool (H, W), True where there is tissue.
        overview: uint8 (H, W, 3), the picture it was found in.
        downsample: Level-0 pixels a pixel of both.
        share: Of the slide that is tissue, 0 to 1.
        pen: Of the slide that is ink of a pen, 0 to 1; not counted as tissue.
    """
    mask: np.ndarray
    overview: np.ndarray
    downsample: float
    share: float
    pen: float


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of a slide, row by row.

    Attributes:
        coords: int64 (N, 2), left and top in level-0 pixels.
        size: Side of a region in level-0 pixels.
        patch_tissue: float32 (N, g, g), share of each patch that is tissue.
        grid: Patches a side.
    """
    coords: np.ndarray
    size: float
    patch_tissue: np.ndarray
    grid: int

    def __len__(self) -> int:
        return len(self.coords)


def find_tissue(slide: Slide, tiling: Tiling) -> Tissue:
    """Tell tissue from glass and ink in an overview.

    Tissue is coloured: saturation above a threshold (Otsu's, but at least 8 of 255) after a median filter of 7 pixels;
    gaps are closed, specks and holes of less than about a patch dropped. Ink of green, blue and black pens, more
    saturated or darker than stains are, is taken out.

    Args:
        slide: Any slide.
        tiling: Eight pixels of the overview are a patch, unless that made more than four million pixels.
    """
    cv2 = import_extra('cv2', 'slides')
    downsample = max(1., tiling.patch_size * tiling.factor(slide) / 8)
    downsample = max(1., min(downsample, min(slide.width, slide.height) / _FEWEST_PIXELS))
    downsample = max(downsample, math.sqrt(slide.width * slide.height / _MOST_PIXELS))
    overview = slide.thumbnail(downsample)
    # OpenCV's hue is 0..179 (blue 120), saturation and value are 0..255
    hue, saturation, value = cv2.split(cv2.cvtColor(overview, cv2.COLOR_RGB2HSV))
    ink = (saturation > 110) & (hue > 35) & (hue < 112) | (value < 70) & (saturation < 90)
    # a pen's line has a margin, a black nucleus is smaller than this opening
    ink = cv2.morphologyEx(ink.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    ink = cv2.dilate(ink, np.ones((7, 7), np.uint8)).astype(bool)
    smooth = cv2.medianBlur(saturation, 7 if min(saturation.shape) >= 7 else 1)
    otsu, _ = cv2.threshold(smooth[~ink][None] if (~ink).any() else smooth, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    # Otsu splits any picture in two; half its threshold still holds the pale tissue, glass is below 8 anyhow
    mask = (smooth > max(8., otsu / 2)) & ~ink
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8))
    # pixels of the mask; a slide may be smaller than a patch
    patch = min((tiling.patch_size * tiling.factor(slide) / downsample) ** 2, mask.size / 64)
    # 100 patches are a speck on a large slide; on a small one half a per cent of the tissue, at least a patch
    speck = min(100 * patch, max(patch, 0.005 * float(mask.sum()), 1.))
    mask = _without_small(cv2, mask, speck)
    mask = 1 - _without_small(cv2, 1 - mask, min(16 * patch, speck))
    mask = mask.astype(bool) & ~ink
    return Tissue(mask, overview, downsample, float(mask.mean()), float(ink.mean()))


def _without_small(cv2: object, mask: np.ndarray, least: float) -> np.ndarray:
    """The 8-connected components of at least so many pixels."""
    _, labels, facts, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)  # type: ignore[attr-defined]
    keep = facts[:, 4] >= least
    keep[0] = False  # what is no component
    return keep[labels].astype(np.uint8)


def make_regions(slide: Slide, tissue: Tissue, tiling: Tiling) -> Regions:
    """Cut the slide into regions without overlap, and keep those with tissue.

    The grid is anchored at the slide's origin, not at the tissue, so that the same slide always gives the same
    regions. A slide smaller than a region is one region, filled up with white.

    Raises:
        InputError: If no region has tissue.
    """
    size = tiling.patch_size * tiling.grid * tiling.factor(slide)  # level-0 pixels, not always whole
    rows, columns = math.ceil(slide.height / size), math.ceil(slide.width / size)
    # sums over any rectangle of the mask in four look-ups
    table = np.pad(tissue.mask.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)

    def edges(count: int, length: int) -> np.ndarray:
        places = np.arange(count * tiling.grid + 1) * (size / tiling.grid) / tissue.downsample
        return places.clip(0, length)

    y, x = edges(rows, tissue.mask.shape[0]), edges(columns, tissue.mask.shape[1])
    sums = _interpolated(_interpolated(table, y).T, x).T
    patches = np.diff(np.diff(sums, axis=0), axis=1)  # tissue in each patch, pixels of the mask
    inside = np.diff(y)[:, None] * np.diff(x)[None]  # of each patch
    g = tiling.grid
    by_region = patches.reshape(rows, g, columns, g).transpose(0, 2, 1, 3)  # rows, columns, g, g
    of_region = inside.reshape(rows, g, columns, g).transpose(0, 2, 1, 3)
    share = by_region.sum((2, 3)) / of_region.sum((2, 3)).clip(1e-9)
    keep = (share >= tiling.min_tissue) & (by_region.sum((2, 3)) > 0)
    if not keep.any():
        raise InputError(
            f"'{slide.path}' has no tissue: of its {rows * columns:,} regions of {tiling.patch_size * g} pixels at "
            f'{tiling.mpp:g} micrometres none is covered to {tiling.min_tissue:.0%}')
    if tiling.max_regions is not None and keep.sum() > tiling.max_regions:
        order = np.argsort(-by_region.sum((2, 3)), axis=None, kind='stable')
        chosen = order[keep.ravel()[order]][:tiling.max_regions]
        keep = np.isin(np.arange(keep.size), chosen).reshape(keep.shape)
    places = np.argwhere(keep)  # row by row
    coords = np.ascontiguousarray((places[:, ::-1] * size).round().astype(np.int64))  # x, y
    cover = by_region / of_region.clip(1e-9)
    return Regions(coords, size, cover[keep].clip(0, 1).astype(np.float32), g)


def _interpolated(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows of a table of sums at places between whole numbers."""
    low = np.floor(places).astype(int).clip(0, len(table) - 1)
    high = (low + 1).clip(0, len(table) - 1)
    share = (places - low)[:, None]
    return table[low] * (1 - share) + table[high] * share
