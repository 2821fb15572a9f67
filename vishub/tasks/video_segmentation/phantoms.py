"""Procedural ultrasound: clips of a layered wall with speckle, shadows, and one hypo-echoic lesion that drifts.

No patient has these. They teach and test the mechanics (speckle, geometry, context), not anatomy. A clip is a pure
function of its seed, so nothing needs to be stored to measure on the same clips again.
"""
from typing import NamedTuple, Sequence, Union

import numpy as np
import torch

from vishub.tasks.video_segmentation.geometry import Sector, to_sector

__all__ = ['SECTOR', 'Phantom', 'as_sector', 'phantom']

SECTOR = Sector(torch.tensor(140.), torch.tensor(0.2))  # of every sector clip
_WEAK = 0.85  # echo of a lesion, relative to what lies around, in frames that hardly show it


class Phantom(NamedTuple):
    """A clip in the order of time.

    Attributes:
        frames: uint8 (T, H, W), grey; rows are depth.
        masks: bool (T, H, W), True in the lesion.
    """
    frames: np.ndarray
    masks: np.ndarray


def phantom(seed: Union[int, Sequence[int]], num_frames: int, side: int = 64, weak: str = 'last') -> Phantom:
    """One clip in linear geometry.

    Args:
        seed: Seed.
        num_frames: Frames T.
        side: Height and width in pixels.
        weak: 'last': in 40 % of the clips the last frame hardly shows the lesion, so that the earlier ones help.
            'any': in a quarter of the frames. 'none': in no frame.
    """
    rng = np.random.default_rng(seed)
    down, across = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing='ij')
    tissue = _wall(rng, down, across)
    centre = rng.uniform(0.3, 0.7, 2)
    # towards the middle more often than away from it, so that long clips keep their lesion in sight
    drift = rng.uniform(0.004, 0.02, 2) * np.where(rng.random(2) < 0.8, np.sign(0.5 - centre), rng.choice([-1, 1], 2))
    radii, contrast = rng.uniform(0.1, 0.2, 2), rng.uniform(0.35, 0.6)
    wobble, phases, pace = rng.uniform(0.02, 0.12, 3), rng.uniform(0, 2 * np.pi, 3), rng.uniform(-0.15, 0.15, 3)
    weak_clip = rng.random() < 0.4

    frames, masks = [], []
    for number in range(num_frames):
        place = 0.5 + 0.3 * _triangle((centre + drift * number - 0.5) / 0.3)
        y, x = (down - place[0]) / radii[0], (across - place[1]) / radii[1]
        angle = np.arctan2(y, x)
        edge = 1 + sum(
            size * np.cos(order * angle + phase + step * number)
            for order, size, phase, step in zip((2, 3, 4), wobble, phases, pace))
        inside = np.hypot(y, x) < edge
        faint = weak_clip and number == num_frames - 1 if weak == 'last' else weak == 'any' and rng.random() < 0.25
        echo = tissue * np.where(inside, _WEAK if faint else contrast, 1.)
        speckle = rng.rayleigh(0.8, (side, side + 2))  # mean 1
        speckle = (speckle[:, :-2] + speckle[:, 1:-1] + speckle[:, 2:]) / 3
        frames.append(np.clip(255 * echo * speckle, 1, 255).astype(np.uint8))  # 0 is outside of the field of view
        masks.append(inside)
    return Phantom(np.stack(frames), np.stack(masks))


def as_sector(clip: Phantom, sector: Sector = SECTOR) -> Phantom:
    """The same clip as a sector of the same size."""
    frames = to_sector(torch.from_numpy(clip.frames)[:, None].float(), sector)
    masks = to_sector(torch.from_numpy(clip.masks)[:, None].float(), sector, 'nearest')
    return Phantom(frames[:, 0].round().byte().numpy(), masks[:, 0].numpy() > 0.5)


def _wall(rng: np.random.Generator, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Mean echo without lesion: layers that undulate, attenuation, two shadows."""
    undulation = 0.03 * np.sin(2 * np.pi * (rng.uniform(0.5, 1.5) * across + rng.random()))
    borders = np.cumsum(rng.uniform(0.06, 0.16, 4))
    levels = rng.uniform(0.35, 0.85, 5)
    layer = np.searchsorted(borders, (down + undulation).ravel()).reshape(down.shape)
    echo = levels[layer] * np.exp(-rng.uniform(0.2, 0.7) * down)
    for _ in range(2):
        shadow = np.abs(across - rng.random()) < rng.uniform(0.01, 0.03)
        echo = np.where(shadow & (down > rng.uniform(0, 0.3)), echo * rng.uniform(0.25, 0.5), echo)
    return echo


def _triangle(x: np.ndarray) -> np.ndarray:
    """x, folded back at -1 and 1."""
    return np.abs((x - 1) % 4 - 2) - 1
