"""A trace as a picture: which input patches are left, merged, or gone."""
import numpy as np
from PIL import Image

from vishub.errors import InputError
from vishub.tokens.tracing import Trace

__all__ = ['visualize']

_PRUNED_LIGHT = 0.25  # how much of a pruned patch is still seen
_BORDER = (255, 255, 255)


def visualize(image: Image.Image, trace: Trace, layer: int = -1, index: int = 0) -> Image.Image:
    """The image as the tokens behind a block see it.

    Patches that share a token have their mean colour and a white border around the group; pruned ones are dimmed; a
    patch that is alone in its token is shown as it is. Where tokens are shared softly, each patch counts for the token
    that has most of it.

    Args:
        image: What the model saw (the crop, at any resolution).
        trace: Of `vishub.tokens.trace`.
        layer: The block; negative ones count from the end.
        index: Image of the batch.

    Returns:
        RGB image of the same size.

    Raises:
        InputError: If `image` is no picture or has fewer pixels than there are patches, `index` is not in the batch, or
            patches were dropped before the first block.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f'visualize: image is a {type(image).__name__}; it must be a PIL image')
    if not 0 <= index < trace.batch:
        raise InputError(f'visualize: index is {index}; this trace has images 0..{trace.batch - 1}')
    rows, columns = trace.grid
    if trace.start - trace.prefix != rows * columns:
        raise InputError(f'visualize: {trace.start - trace.prefix} patches entered the first block, the grid has '
                         f'{rows} x {columns}; patch dropout hides where they are')
    pixels = np.asarray(image.convert('RGB')).astype(np.float32)  # H, W, 3
    height, width = pixels.shape[:2]
    if height < rows or width < columns:
        raise InputError(f'visualize: the image is {width} x {height}, smaller than its {columns} x {rows} patches')
    groups = trace.assignment(layer)[index, trace.prefix:].cpu().numpy()  # rows * columns
    patch = _patch_of_pixel(height, rows)[:, None] * columns + _patch_of_pixel(width, columns)[None]  # H, W

    kept = groups >= 0
    members = np.bincount(groups[kept], minlength=trace.start)
    group = groups[patch]  # H, W
    own = np.where(group < 0, 0, group)
    area = np.maximum(np.bincount(own[group >= 0], minlength=trace.start), 1)
    mean = np.stack([
        np.bincount(own[group >= 0], weights=pixels[..., c][group >= 0], minlength=trace.start) / area
        for c in range(3)], axis=-1)  # groups, 3
    merged = (group >= 0) & (members[own] > 1)
    out = np.where(merged[..., None], mean[own], pixels)
    out[group < 0] *= _PRUNED_LIGHT
    out[_borders(group) & _beside(merged)] = _BORDER
    return Image.fromarray(out.round().astype(np.uint8))


def _patch_of_pixel(pixels: int, patches: int) -> np.ndarray:
    return np.arange(pixels) * patches // pixels


def _borders(group: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose right or lower neighbour is of another group."""
    edge = np.zeros(group.shape, dtype=bool)
    edge[:, :-1] |= group[:, :-1] != group[:, 1:]
    edge[:-1] |= group[:-1] != group[1:]
    return edge


def _beside(merged: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels in a merged group, or with one to the right or below."""
    near = merged.copy()
    near[:, :-1] |= merged[:, 1:]
    near[:-1] |= merged[1:]
    return near
