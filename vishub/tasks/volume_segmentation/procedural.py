"""Volumes made by a recipe: an organ with vessels through it, among things that look like either.

They need no patient and have an exact truth, so that a small network can be trained and judged on any machine.
"""
from typing import Sequence, Tuple

import numpy as np

__all__ = ['LABELS', 'procedural_volume']

LABELS = ('background', 'organ', 'tubes')
_BACKGROUND = 0.3


def procedural_volume(size: int, seed: Sequence[int]) -> Tuple[np.ndarray, np.ndarray]:
    """A CT-like volume and its labels.

    An ellipsoid (class 1) 0.2 to 0.4 brighter than what surrounds it, 1 to 4 curved tubes (class 2) of radius 1.5 to
    3 voxels that cross it, 4 to 8 blobs as bright as either (class 0), a smooth bias field of up to 15 %, and noise of
    standard deviation 0.15. Lengths that are not in voxels scale with `size`.

    Args:
        size: Voxels a side, at least 16.
        seed: What the volume depends on, and nothing else.

    Returns:
        float32 (size, size, size), mostly from 0 to 1, and uint8 labels of that shape.
    """
    rng = np.random.default_rng(list(seed))
    axes = np.meshgrid(*(np.arange(size, dtype=np.float32),) * 3, indexing='ij', sparse=True)
    image = np.full((size,) * 3, _BACKGROUND, np.float32)
    label = np.zeros((size,) * 3, np.uint8)

    centre = size * rng.uniform(0.38, 0.62, 3)
    organ = _ellipsoid(axes, centre, size * rng.uniform(0.17, 0.33, 3), rng)
    organ_value = _BACKGROUND + rng.uniform(0.2, 0.4)
    tube_value = organ_value + rng.uniform(0.25, 0.4)
    for _ in range(rng.integers(4, 9)):
        value = rng.choice([organ_value, tube_value]) + rng.uniform(-0.05, 0.05)
        blob = _ellipsoid(axes, rng.uniform(0, size, 3), size * rng.uniform(0.04, 0.09, 3), rng)
        image[blob] = value
    image[organ] = organ_value
    label[organ] = 1
    for _ in range(rng.integers(1, 5)):
        tube = _tube(size, centre, rng)
        image[tube] = tube_value
        label[tube] = 2

    field = _bias_field(axes, size, rng)
    image = image * field + rng.normal(0, 0.15, image.shape).astype(np.float32)
    return image.astype(np.float32), label


def _ellipsoid(
        axes: Sequence[np.ndarray], centre: np.ndarray, radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where a turned ellipsoid is, bool."""
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32) / radii[:, None].astype(np.float32)
    offsets = [axis - np.float32(c) for axis, c in zip(axes, centre)]
    distance = sum((row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2]) ** 2 for row in turn)
    return np.asarray(distance <= 1)


def _tube(size: int, centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tube along a quadratic curve from one side to the other, near the organ's centre in between, bool."""
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    start, end = (centre + sign * 0.6 * size * direction + rng.normal(0, 0.12 * size, 3) for sign in (-1, 1))
    bend = centre + rng.normal(0, 0.15 * size, 3)
    radius = rng.uniform(1.5, 3)
    t = np.linspace(0, 1, 4 * size)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t ** 2 * end  # 4 * size, 3
    reach = np.arange(-3, 4)
    ball = np.stack(np.meshgrid(reach, reach, reach, indexing='ij'), -1).reshape(-1, 3)
    voxels = np.round(curve)[:, None] + ball  # all that may lie in the tube
    inside = np.square(voxels - curve[:, None]).sum(-1) <= radius ** 2
    voxels = voxels[inside].astype(int)
    voxels = voxels[((voxels >= 0) & (voxels < size)).all(1)]
    mask = np.zeros((size,) * 3, bool)
    mask[tuple(voxels.T)] = True
    return mask


def _bias_field(axes: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """A plane wave longer than the volume, around 1."""
    wave = rng.normal(size=3)
    wave *= rng.uniform(0.3, 0.8) * 2 * np.pi / (np.linalg.norm(wave) * size)
    phase = sum(np.float32(w) * axis for w, axis in zip(wave, axes)) + rng.uniform(0, 2 * np.pi)
    return (1 + rng.uniform(0, 0.15) * np.sin(phase)).astype(np.float32)
