"""The geometry of tracking: boxes, and the square crops that a network sees of a frame.

A box is x, y, w, h in pixels, top left first, continuous: it covers [x, x + w] x [y, y + h].
"""
import math
from typing import Any, Tuple

import numpy as np
from PIL import Image

from vishub.errors import InputError

__all__ = [
    'SEARCH_FACTOR', 'TEMPLATE_FACTOR', 'as_image', 'box_in_crop', 'box_in_frame', 'check_box', 'clip_box', 'crop',
    'crop_side', 'iou', 'mean_colour',
]

TEMPLATE_FACTOR, SEARCH_FACTOR = 2., 4.  # side of a crop, in multiples of sqrt(w * h); our choice
_MOST_SIDE = 2048  # larger crops are reduced before they are put together, or a large target in 4K would need gigabytes


def crop_side(width: float, height: float, factor: float) -> int:
    """Side of the crop around a target, in pixels of the frame: ceil(sqrt(w * h) * factor), as in STARK."""
    return max(1, math.ceil(math.sqrt(width * height) * factor))


def crop(image: np.ndarray, centre: Tuple[float, float], side: int, out: int, fill: np.ndarray) -> np.ndarray:
    """A square of a frame, bilinearly scaled.

    Args:
        image: uint8 (H, W, 3).
        centre: cx, cy in pixels; may lie anywhere.
        side: Of the square, in pixels of the frame.
        out: Of the result.
        fill: Colour (3,) of what lies outside the frame.

    Returns:
        uint8 (out, out, 3).
    """
    height, width = image.shape[:2]
    left, top = _corner(centre, side)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    reduced = -(-side // _MOST_SIDE)
    size = -(-side // reduced)
    patch = np.empty((size, size, 3), np.uint8)
    patch[:] = np.round(fill).astype(np.uint8)
    if x1 > x0 and y1 > y0:
        seen: Any = image[y0:y1, x0:x1]
        if reduced > 1:
            seen = np.asarray(Image.fromarray(np.ascontiguousarray(seen)).reduce(reduced))
        row, column = (y0 - top) // reduced, (x0 - left) // reduced
        seen = seen[:size - row, :size - column]
        patch[row:row + seen.shape[0], column:column + seen.shape[1]] = seen
    if size == out:
        return patch
    return np.asarray(Image.fromarray(patch).resize((out, out), Image.Resampling.BILINEAR))


def box_in_crop(box: np.ndarray, centre: Tuple[float, float], side: int) -> np.ndarray:
    """x, y, w, h in the frame -> cx, cy, w, h in units of the crop, float32 (4,)."""
    left, top = _corner(centre, side)
    x, y, w, h = (float(value) for value in box)
    return np.array([x + w / 2 - left, y + h / 2 - top, w, h], np.float32) / side


def box_in_frame(box: np.ndarray, centre: Tuple[float, float], side: int) -> np.ndarray:
    """cx, cy, w, h in units of the crop -> x, y, w, h in the frame, float64 (4,)."""
    left, top = _corner(centre, side)
    cx, cy, w, h = (float(value) * side for value in box)
    return np.array([left + cx - w / 2, top + cy - h / 2, w, h])


def _corner(centre: Tuple[float, float], side: int) -> Tuple[int, int]:
    """Left and top of the square in whole pixels; boxes are turned with the same, so that none loses half a pixel."""
    return round(centre[0] - side / 2), round(centre[1] - side / 2)


def clip_box(box: np.ndarray, width: int, height: int, min_size: float) -> np.ndarray:
    """Bring the centre into the frame and the sides to [min_size, side of the frame], as TransT and TCTrack do."""
    x, y, w, h = box
    cx, cy = min(max(x + w / 2, 0.), width), min(max(y + h / 2, 0.), height)
    w, h = min(max(w, min(min_size, width)), width), min(max(h, min(min_size, height)), height)
    return np.array([cx - w / 2, cy - h / 2, w, h])


def mean_colour(image: np.ndarray) -> np.ndarray:
    """Mean colour of a frame, float64 (3,); of every fourth row and column where it is large."""
    step = 4 if image.shape[0] * image.shape[1] > 1 << 18 else 1
    return image[::step, ::step].mean((0, 1), dtype=np.float64)


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Overlap of boxes (..., 4), x, y, w, h; NaN where one of them is NaN, 0 where the union is empty."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:])
    shared = (high - low).clip(min=0).prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), union * 0)


def as_image(image: Any) -> np.ndarray:
    """A frame as uint8 (H, W, 3); grey (H, W) becomes three equal channels.

    Raises:
        InputError: If it is anything else.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode in ('L', 'RGB', 'RGBA') else image.convert('RGB'))
    right = 'give an RGB frame, uint8 of shape (height, width, 3), or a grey one (height, width)'
    if not isinstance(image, np.ndarray):
        raise InputError(f'cannot track in a {type(image).__name__}: {right}')
    if image.dtype != np.uint8:
        raise InputError(f'the frame has values of type {image.dtype}: {right}')
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f'the frame has shape {" x ".join(map(str, image.shape))}: {right}')
    if 0 in image.shape:
        raise InputError(f'the frame has no pixels (shape {" x ".join(map(str, image.shape))}): {right}')
    return image


def check_box(box: Any, width: int, height: int) -> np.ndarray:
    """An initial box as float64 (4,).

    Raises:
        InputError: If it is not four finite numbers of positive size that meet the frame.
    """
    try:
        values = np.asarray(box, np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise InputError(f'initial box must be x, y, w, h with positive size, not {box!r}') from error
    if values.shape != (4,) or not np.isfinite(values).all() or (values[2:] <= 0).any():
        raise InputError(f'initial box must be x, y, w, h with positive size, not {values.tolist()}')
    x, y, w, h = values.tolist()
    if w * h < 1:
        raise InputError(f'target is smaller than one pixel: the initial box is {w:g} x {h:g}')
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise InputError(
            f'initial box {x:g}, {y:g}, {w:g}, {h:g} lies outside the frame of {width} x {height} pixels')
    return values
