"""From a scan's grid and grey values to those that a network was trained on, and its planes of logits back.

Three schemes of grey values, after nnU-Net's rules:

* `zscore` (MR, and what has no unit): each channel minus its mean, divided by its standard deviation;
* `zscore_nonzero` (MR cut out of its surroundings): the same over the voxels that are not 0, which stay 0;
* `ct` (Hounsfield units): clipped to the training foreground's 0.5 and 99.5 percentiles, minus its mean, divided by
  its standard deviation.
"""
import dataclasses
from typing import Any, Dict, Iterable, Iterator, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from vishub.errors import InputError, import_extra

__all__ = ['SCHEMES', 'Preprocessing', 'foreground_statistics', 'planes_to_grid', 'resample', 'resample_labels']

SCHEMES = ('zscore', 'zscore_nonzero', 'ct')
Spacing = Tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a volume is prepared.

    Attributes:
        intensity: One of `SCHEMES`.
        spacing: Millimetres along D, H, W of the grid that the network works on; None for the scan's own.
        low, high: Of `ct`: the bounds to clip to.
        mean, std: Of `ct`: of the training foreground.
    """
    intensity: str = 'zscore'
    spacing: Optional[Spacing] = None
    low: float = 0.
    high: float = 0.
    mean: float = 0.
    std: float = 1.

    def __post_init__(self) -> None:
        if self.intensity not in SCHEMES:
            raise InputError(f"intensity is '{self.intensity}': it is one of {', '.join(SCHEMES)}")
        if self.spacing is not None and not (len(self.spacing) == 3 and min(self.spacing) > 0):
            raise InputError(f'spacing is {self.spacing}: give three positive lengths in mm, along D, H, W')
        if self.intensity == 'ct' and not (self.high > self.low and self.std > 0):
            raise InputError('the scheme ct needs low < high and a positive std: figures of the training foreground')

    def to_dict(self) -> Dict[str, Any]:
        """As JSON types, without what does not matter."""
        names = ('intensity', 'spacing') + (('low', 'high', 'mean', 'std') if self.intensity == 'ct' else ())
        facts = {name: getattr(self, name) for name in names}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items() if v is not None}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> 'Preprocessing':
        """What `to_dict` gave; an empty dict gives the defaults."""
        facts = dict(facts)
        if facts.get('spacing') is not None:
            facts['spacing'] = tuple(float(value) for value in facts['spacing'])
        return cls(**facts)

    def normalise(self, data: np.ndarray) -> np.ndarray:
        """Grey values (C, D, H, W), float32 -> the same shape as the network wants them."""
        if self.intensity == 'ct':
            return (data.clip(self.low, self.high) - np.float32(self.mean)) / np.float32(max(self.std, 1e-8))
        nonzero = self.intensity == 'zscore_nonzero'
        out = np.empty_like(data, dtype=np.float32)
        for channel, values in enumerate(data):
            mean, std = _moments(values, nonzero)
            for plane, result in zip(values, out[channel]):
                result[:] = (plane - np.float32(mean)) / np.float32(max(std, 1e-8))
                if nonzero:
                    result[plane == 0] = 0
        return out

    def size(self, shape: Sequence[int], spacing: Sequence[float]) -> Tuple[int, int, int]:
        """Voxels D, H, W of the working grid for a volume of `shape` and `spacing`; the extent stays."""
        if self.spacing is None:
            return tuple(shape)  # type: ignore[return-value]
        return tuple(max(1, round(n * own / wanted))  # type: ignore[return-value]
                     for n, own, wanted in zip(shape, spacing, self.spacing))

    def prepare(self, data: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """Grey values (C, D, H, W) at `spacing` -> normalised and resampled, float32 (C, D', H', W')."""
        data = self.normalise(data.astype(np.float32, copy=False))
        return resample(data, self.size(data.shape[1:], spacing), spacing)


def _moments(values: np.ndarray, nonzero: bool) -> Tuple[float, float]:
    """Mean and standard deviation of (D, H, W), or of what is not 0 in it; plane by plane, for float64 takes room."""
    planes = [plane[plane != 0] if nonzero else plane.ravel() for plane in values]
    count = sum(plane.size for plane in planes)
    if not count:
        return 0., 1.
    mean = sum(float(plane.sum(dtype=np.float64)) for plane in planes) / count
    square = sum(float(np.square(plane.astype(np.float64) - mean).sum()) for plane in planes) / count
    return mean, square ** 0.5


def resample(data: np.ndarray, size: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Values on another grid of the same extent: cubic splines, along a far coarser axis the nearest plane.

    An axis is coarse if its spacing is more than three times the others' (nnU-Net's rule): there planes have little to
    do with each other, and a spline between them would make structures that are not there.

    Args:
        data: float32 (C, D, H, W).
        size: Voxels D, H, W wanted.
        spacing: Of `data`, along D, H, W.
    """
    ndimage = import_extra('scipy.ndimage', 'medical')
    for axis, wanted in enumerate(size):
        own = data.shape[axis + 1]
        if own == wanted:
            continue
        if _is_coarse(axis, spacing):
            nearest = ((np.arange(wanted) + 0.5) * own / wanted).astype(int).clip(0, own - 1)
            data = data.take(nearest, axis=axis + 1)
        else:
            # splines are separable: along one axis a matrix, which is what the splines make of unit vectors
            matrix = ndimage.zoom(
                np.eye(own), (wanted / own, 1), order=min(3, own - 1), mode='grid-mirror', grid_mode=True)
            data = np.moveaxis(np.tensordot(data, matrix.astype(np.float32), axes=(axis + 1, 1)), -1, axis + 1)
    return np.ascontiguousarray(data, dtype=np.float32)


def resample_labels(labels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Labels (D, H, W) on another grid of the same extent, by the nearest voxel."""
    for axis, wanted in enumerate(size):
        own = labels.shape[axis]
        nearest = ((np.arange(wanted) + 0.5) * own / wanted).astype(int).clip(0, own - 1)
        labels = labels if own == wanted else labels.take(nearest, axis=axis)
    return np.ascontiguousarray(labels)


def _is_coarse(axis: int, spacing: Sequence[float]) -> bool:
    others = [s for i, s in enumerate(spacing) if i != axis]
    return spacing[axis] > 3 * max(others)


def planes_to_grid(
        planes: Iterable[torch.Tensor], depth: int, size: Sequence[int]) -> Iterator[torch.Tensor]:
    """Planes of logits on the working grid -> planes on the scan's own grid, linearly, two in memory at a time.

    Args:
        planes: `depth` maps (K, H', W'), in order.
        depth: How many there are.
        size: Voxels D, H, W of the scan's grid, of the same extent.

    Yields:
        D maps (K, H, W), in order.
    """
    source = iter(planes)
    number = -1
    lower = upper = torch.empty(0)

    def following() -> torch.Tensor:
        plane = next(source)
        if tuple(plane.shape[1:]) == tuple(size[1:]):
            return plane
        return F.interpolate(plane[None], size=tuple(size[1:]), mode='bilinear', align_corners=False)[0]

    for target in range(size[0]):
        position = min(max((target + 0.5) * depth / size[0] - 0.5, 0.), depth - 1.)
        below, share = int(position), position - int(position)
        while number < min(below + 1, depth - 1):  # read on until `upper` is the plane above the position
            lower, upper = upper, following()
            number += 1
        if number == below:  # the last plane: there is none above
            yield upper
        else:
            yield lower if share == 0 else torch.lerp(lower, upper, share)


def foreground_statistics(values: np.ndarray) -> Dict[str, float]:
    """What the scheme `ct` needs, of the grey values of training foregrounds: 0.5 and 99.5 percentile, mean, std."""
    if not values.size:
        raise InputError('no training volume has a foreground, so the scheme ct has nothing to go by')
    low, high = np.percentile(values, (0.5, 99.5))
    return {'low': float(low), 'high': float(high), 'mean': float(values.mean()), 'std': float(values.std())}
