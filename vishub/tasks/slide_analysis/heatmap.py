"""Heat maps of a slide: painted on its overview, and as objects for QuPath."""
from typing import Any, Dict, List

import numpy as np
from PIL import Image

from vishub.tasks import drawing

__all__ = ['heat_geojson', 'paint', 'scaled_heat']

_MOST_PATCHES = 1000  # as objects: QuPath shows them all at once


def scaled_heat(heat: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Heat from its 1st to its 99th percentile over the tissue as 0 to 1; what is no tissue is 0.

    Args:
        heat: (N, g, g), any scale.
        tissue: bool (N, g, g).
    """
    low, high = np.percentile(heat[tissue] if tissue.any() else heat, (1, 99))
    scaled = ((heat - low) / max(high - low, 1e-12)).clip(0, 1)
    return np.where(tissue, scaled, 0.).astype(np.float32)


def paint(
        overview: np.ndarray, coords: np.ndarray, size: float, heat: np.ndarray, tissue: np.ndarray, opacity: float,
) -> Image.Image:
    """Lay a heat map over the overview, a square a patch.

    Args:
        overview: uint8 (H, W, 3).
        coords: (N, 2), left and top of the regions in pixels of the overview.
        size: Side of a region in the same.
        heat: (N, g, g), 0 to 1.
        tissue: bool (N, g, g); other patches are left as they are.
        opacity: Of the hottest, 0 to 1; the coldest have a third of it.
    """
    high, wide = overview.shape[:2]
    canvas = overview.astype(np.float32)
    colours, alphas = drawing.heat_colours(heat).astype(np.float32), opacity * (1 + 2 * heat) / 3
    grid = heat.shape[1]
    for number, (x, y) in enumerate(coords):
        columns = (x + size * np.arange(grid + 1) / grid).round().astype(int).clip(0, wide)
        rows = (y + size * np.arange(grid + 1) / grid).round().astype(int).clip(0, high)
        for row, column in np.argwhere(tissue[number]):
            box = (slice(rows[row], rows[row + 1]), slice(columns[column], columns[column + 1]))
            place = (number, row, column)
            canvas[box] += alphas[place] * (colours[place] - canvas[box])
    return Image.fromarray(canvas.round().astype(np.uint8))


def heat_geojson(
        coords: np.ndarray, size: float, region_heat: np.ndarray, patch_heat: np.ndarray, patch_tissue: np.ndarray,
        label: str,
) -> Dict[str, Any]:
    """A GeoJSON FeatureCollection as QuPath reads it: a region is an annotation, a patch a tile.

    Both have the measurement `attention` and a colour that shows it. Coordinates are level-0 pixels.

    Args:
        coords: (N, 2), left and top of the regions.
        size: Side of a region.
        region_heat: (N,), shares.
        patch_heat, patch_tissue: (N, g, g); the thousand patches with the most heat are written.
        label: Name of the class that the heat speaks of.
    """
    grid = patch_heat.shape[1]
    features: List[Dict[str, Any]] = []
    top = max(float(region_heat.max()), 1e-12)
    for number, ((x, y), share) in enumerate(zip(coords.tolist(), region_heat.tolist()), 1):
        features.append(_square('annotation', x, y, size, share, share / top, f'region {number}', label))
    scaled = scaled_heat(patch_heat, patch_tissue > 0)
    heat = np.where(patch_tissue > 0, patch_heat, -1.)
    side = size / grid
    for place in np.argsort(-heat, axis=None, kind='stable')[:_MOST_PATCHES]:
        number, row, column = np.unravel_index(place, heat.shape)
        if heat[number, row, column] < 0:
            break
        x, y = coords[number, 0] + side * column, coords[number, 1] + side * row
        features.append(_square(
            'tile', float(x), float(y), side, float(heat[number, row, column]), float(scaled[number, row, column]),
            f'patch {row + 1}/{column + 1} of region {number + 1}', label))
    return {'type': 'FeatureCollection', 'features': features}


def _square(
        kind: str, x: float, y: float, side: float, share: float, shade: float, name: str, label: str,
) -> Dict[str, Any]:
    left, top, right, bottom = (round(value, 2) for value in (x, y, x + side, y + side))
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {
        'type': 'Feature',
        'geometry': {'type': 'Polygon', 'coordinates': [ring]},
        'properties': {
            'objectType': kind, 'name': name, 'isLocked': True,
            'classification': {'name': label, 'color': drawing.heat_colours(np.asarray(shade, np.float64)).tolist()},
            'measurements': {'attention': round(share, 8)},
        },
    }
