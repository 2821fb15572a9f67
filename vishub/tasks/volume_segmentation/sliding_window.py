"""A network of patches over a whole volume, in bounded memory.

As nnU-Net does it: windows that overlap by half, evenly spaced; every window's logits weighted by a Gaussian, summed,
and divided by the sum of weights; mirrored copies averaged. MONAI's `sliding_window_inference` does nearly the same,
but it holds the logits of the whole volume (13 GB for 512 x 512 x 600 and 20 classes). Here windows come in the order
of depth, and a plane of logits is given away as soon as no later window touches it: what is held is one patch deep.
"""
import itertools
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from vishub.errors import import_extra

__all__ = ['gaussian_window', 'sliding_planes', 'window_starts']

Network = Callable[[torch.Tensor], torch.Tensor]


def window_starts(size: int, patch: int, overlap: float = 0.5) -> List[int]:
    """Where windows begin along one axis: the fewest that overlap by at least `overlap`, evenly spaced.

    110 voxels and a patch of 64 give 0, 23, 46. Halves are rounded to even, as numpy does.

    Args:
        size: Voxels along the axis, at least `patch`.
        patch: Voxels of a window.
        overlap: Share of a window, from 0 to less than 1.
    """
    if size <= patch:
        return [0]
    step = (1 - overlap) * patch
    count = int(np.ceil((size - patch) / step)) + 1
    return [int(start) for start in np.round(np.arange(count) * (size - patch) / (count - 1))]


def gaussian_window(patch: Sequence[int]) -> torch.Tensor:
    """Weights of a window's voxels, float32 (D, H, W): at most 1, nowhere 0.

    A unit impulse in the middle (at index p // 2), filtered with sigma = p / 8 along each axis and cut at 4 sigma;
    what is left 0 gets the smallest weight that is not.
    """
    ndimage = import_extra('scipy.ndimage', 'medical')
    weights = np.ones(1)
    for size in patch:
        impulse = np.zeros(size)
        impulse[size // 2] = 1
        line = ndimage.gaussian_filter1d(impulse, size / 8, mode='constant', truncate=4)
        weights = np.multiply.outer(weights, line)
    weights = (weights[0] / weights.max()).astype(np.float32)
    weights[weights == 0] = weights[weights > 0].min()
    return torch.from_numpy(weights)


def sliding_planes(
        network: Network,
        volume: torch.Tensor,
        patch: Sequence[int],
        *,
        overlap: float = 0.5,
        mirror: bool = False,
        batch_size: int = 4,
        device: Optional[torch.device] = None,
        advance: Optional[Callable[[int, int], None]] = None,
) -> Iterator[torch.Tensor]:
    """Logits of a volume, plane by plane along D.

    Args:
        network: Windows (B, C, *patch) -> logits (B, K, *patch), on `device`.
        volume: float32 (C, D, H, W), on the CPU. What is smaller than the patch is padded with 0, centred.
        patch: Size of a window.
        overlap: See `window_starts`.
        mirror: Also run every window flipped along each set of axes, and average the eight.
        batch_size: Windows (and mirrored windows) a forward pass.
        device: Where the network is.
        advance: Called with (windows done, windows in all).

    Yields:
        For each index along D, in order: float32 (K, H, W) on the CPU.
    """
    device = device or torch.device('cpu')
    size = volume.shape[1:]
    before = [max(p - s, 0) // 2 for s, p in zip(size, patch)]
    after = [max(p - s, 0) - b for s, p, b in zip(size, patch, before)]
    if any(before) or any(after):
        pads = [pad for b, a in zip(reversed(before), reversed(after)) for pad in (b, a)]
        volume = F.pad(volume, pads)
    depth, height, width = volume.shape[1:]
    starts = [window_starts(s, p, overlap) for s, p in zip((depth, height, width), patch)]
    weights = gaussian_window(patch)
    flips: List[Tuple[int, ...]] = [()]
    if mirror:
        flips = [axes for count in range(4) for axes in itertools.combinations((2, 3, 4), count)]
    total, done = int(np.prod([len(s) for s in starts])), 0
    rows, columns = slice(before[1], before[1] + size[1]), slice(before[2], before[2] + size[2])

    held: Optional[torch.Tensor] = None  # of the planes first..first + patch depth: sums of logits, last of weights
    for number, first in enumerate(starts[0]):
        windows = list(itertools.product(starts[1], starts[2]))
        for begin in range(0, len(windows), batch_size):
            group = windows[begin:begin + batch_size]
            batch = torch.stack([
                volume[:, first:first + patch[0], h:h + patch[1], w:w + patch[2]] for h, w in group]).to(device)
            logits = _averaged(network, batch, flips, batch_size).cpu()
            if held is None:
                held = torch.zeros(logits.shape[1] + 1, patch[0], height, width)
            for one, (h, w) in zip(logits, group):
                place = held[:, :, h:h + patch[1], w:w + patch[2]]
                place[:-1] += one * weights
                place[-1] += weights
            done += len(group)
            if advance is not None:
                advance(done, total)
        assert held is not None
        following = starts[0][number + 1] if number + 1 < len(starts[0]) else first + patch[0]
        ready = following - first
        for plane in range(ready):
            if before[0] <= first + plane < before[0] + size[0]:
                sums = held[:, plane, rows, columns]
                yield sums[:-1] / sums[-1]
        held = torch.cat([held[:, ready:], torch.zeros_like(held[:, :ready])], dim=1)


def _averaged(network: Network, batch: torch.Tensor, flips: Sequence[Tuple[int, ...]], batch_size: int) -> torch.Tensor:
    """Mean of the logits over mirrored copies of a batch, as many at a time as the batch may have."""
    copies = [(axes, batch.flip(axes) if axes else batch) for axes in flips]
    together = max(1, batch_size // len(batch))
    total: Optional[torch.Tensor] = None
    for begin in range(0, len(copies), together):
        group = copies[begin:begin + together]
        outputs = network(torch.cat([copy for _, copy in group])).float().split(len(batch))
        for (axes, _), logits in zip(group, outputs):
            logits = logits.flip(axes) if axes else logits
            total = logits if total is None else total + logits
    assert total is not None
    return total / len(flips)
