"""Pictures of any size, tile by tile: where the tiles lie, how they fade into each other, in memory for a row of them.

Tiles lie as in the official code, and neighbours fade linearly. Where the last tile lies so far back that three
overlap, the official weights do not sum to one, and the brightness is off by up to 5 %; here weights are divided by
their sum, which changes nothing elsewhere.
"""
import itertools
from typing import Callable, List, Optional, Tuple

import numpy as np

__all__ = ['mirrored', 'run_tiles', 'tile_weights', 'tiles_of']

# rows, columns of a tile
Region = Tuple[int, int, int, int]


def tiles_of(length: int, tile: int, overlap: int) -> List[int]:
    """Starts of the tiles along an axis; each has min(length, tile) pixels, and the last ends with the axis.

    Raises:
        ValueError: If tiles would not move on, or more than two regular ones would overlap.
    """
    if overlap < 0 or tile < 2 * overlap or tile < 1:
        raise ValueError(f'a tile of {tile} pixels must have at least twice the overlap of {overlap}')
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def tile_weights(length: int, tile: int, overlap: int) -> List[np.ndarray]:
    """Weight of each tile's pixels along an axis, float32; over all tiles they sum to one at every pixel."""
    starts = tiles_of(length, tile, overlap)
    size = min(length, tile)
    weights = [np.ones(size) for _ in starts]
    for number, (before, after) in enumerate(itertools.pairwise(starts)):
        shared = before + size - after
        if shared > 0:
            ramp = np.linspace(0, 1, shared)
            weights[number][size - shared:] *= ramp[::-1]
            weights[number + 1][:shared] *= ramp
    total = np.zeros(length)
    for start, weight in zip(starts, weights):
        total[start:start + size] += weight
    return [(weight / total[start:start + size]).astype(np.float32) for start, weight in zip(starts, weights)]


def mirrored(index: np.ndarray, length: int) -> np.ndarray:
    """Indices beyond an axis, mirrored into it without repeating its ends, as often as need be."""
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    index = index % period
    return np.where(index < length, index, period - index)


def run_tiles(
        size: Tuple[int, int],
        tile: int,
        overlap: int,
        run: Callable[[int, int, int, int], np.ndarray],
        write: Callable[[int, np.ndarray], None],
        progress: Optional[Callable[[int, int], None]] = None,
) -> int:
    """Run a picture's tiles row by row, and hand finished rows of pixels on.

    Args:
        size: Height and width of the picture.
        tile, overlap: Of the tiles, in pixels.
        run: `run(top, left, height, width)` gives a tile's result, float (height, width, C).
        write: `write(top, rows)` takes finished rows, float32 (h, width, C), in order, each once.
        progress: Called with (tiles done, tiles in all), first with 0.

    Returns:
        Number of tiles.
    """
    (height, width), sides = size, [min(length, tile) for length in size]
    tops, lefts = (tiles_of(length, tile, overlap) for length in size)
    weights_y, weights_x = (tile_weights(length, tile, overlap) for length in size)
    total, done = len(tops) * len(lefts), 0
    if progress is not None:
        progress(0, total)
    rows: Optional[np.ndarray] = None  # of the tiles at hand, not finished yet
    for number, top in enumerate(tops):
        for left, weight_x in zip(lefts, weights_x):
            result = run(top, left, *sides)
            if rows is None:
                rows = np.zeros((sides[0], width, result.shape[2]), np.float32)
            weight = weights_y[number][:, None, None] * weight_x[None, :, None]
            rows[:, left:left + sides[1]] += weight * result
            done += 1
            if progress is not None:
                progress(done, total)
        assert rows is not None
        finished = (tops[number + 1] if number + 1 < len(tops) else height) - top  # no later tile reaches these
        write(top, rows[:finished])
        rows = np.concatenate([rows[finished:], np.zeros_like(rows[:finished])])
    return total
