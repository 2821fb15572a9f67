"""Scan geometries of ultrasound: linear frames (depth x lateral) and sectors, and the way from one to the other.

`to_sector` and `to_linear` are ours: by inverse mapping, each undoes the other, the near field lies at the apex.
`linear_to_convex` and `convex_to_linear` give pixel for pixel what the official ASMA (adaptive scanning-mode
augmentation) of ASTR, arXiv:2408.10067, gives; its linear_to_convex puts the near field at the outer arc, which the
paper's figure contradicts.
"""
import math
from typing import NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from vishub.errors import InputError

__all__ = [
    'ConvexScan', 'Sector', 'convex_to_linear', 'find_convex_scan', 'find_sector', 'linear_to_convex', 'random_sectors',
    'to_linear', 'to_sector',
]


class Sector(NamedTuple):
    """Where a sector lies in its picture: the apex in the middle of the top edge, the outer arc at the bottom edge.

    Left and right the picture ends where the sector does.

    Attributes:
        angle: Opening in degrees, one number or a tensor (B,), above 0 and at most 180.
        r0: Radius of the inner arc, in units of the imaged depth (outer less inner radius); number or (B,).
    """
    angle: torch.Tensor
    r0: torch.Tensor

    def columns(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Angle in radians, r0, and half the picture's width, each (B, 1, 1)."""
        angle, r0 = (torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in self)
        if bool((angle <= 0).any()) or bool((angle > 180).any()) or bool((r0 < 0).any()):
            raise InputError(f'a sector opens by more than 0 and at most 180 degrees from r0 >= 0 on, not {self}')
        angle = torch.deg2rad(angle)
        return angle, r0, (r0 + 1) * torch.sin(angle / 2)


def random_sectors(count: int) -> Sector:
    """Sectors of 120 to 170 degrees, r0 0.15 to 0.3, from torch's global generator."""
    return Sector(120 + 50 * torch.rand(count), 0.15 + 0.15 * torch.rand(count))


def to_sector(
        x: torch.Tensor, sector: Sector, mode: str = 'bilinear', near_field: str = 'apex',
        size: Optional[Tuple[int, int]] = None,
) -> torch.Tensor:
    """Linear frames as sectors.

    Args:
        x: (B, C, H, W) floating point; row 0 is the near field.
        sector: One for all, or one a sample.
        mode: 'bilinear' for pictures, 'nearest' for masks.
        near_field: 'apex', or 'outer' for the order of the official code.
        size: Height and width of the result; those of `x` by default.

    Returns:
        (B, C, *size), 0 outside of the sector.
    """
    angle, r0, half_width = sector.columns()
    height, width = size or x.shape[2:]
    across = torch.linspace(-1, 1, width).view(1, 1, -1) * half_width  # B, 1, W
    down = torch.linspace(0, 1, height).view(1, -1, 1) * (r0 + 1)  # B, H, 1
    depth = torch.hypot(across, down) - r0
    lateral = torch.atan2(across, down.expand(-1, -1, width)) / angle
    inside = (depth >= 0) & (depth <= 1 + 1e-6) & (lateral.abs() <= 0.5 + 1e-6)  # B, H, W
    if near_field == 'outer':
        depth = 1 - depth
    elif near_field != 'apex':
        raise InputError(f"near_field is '{near_field}': give apex or outer")
    return _sample(x, 2 * lateral, 2 * depth - 1, mode) * inside[:, None].to(x)


def to_linear(
        x: torch.Tensor, sector: Sector, mode: str = 'bilinear', near_field: str = 'apex',
        size: Optional[Tuple[int, int]] = None,
) -> torch.Tensor:
    """Sectors as linear frames; undoes `to_sector` with the same arguments."""
    angle, r0, half_width = sector.columns()
    height, width = size or x.shape[2:]
    depth = torch.linspace(0, 1, height).view(1, -1, 1)
    if near_field == 'outer':
        depth = 1 - depth
    elif near_field != 'apex':
        raise InputError(f"near_field is '{near_field}': give apex or outer")
    alpha = torch.linspace(-0.5, 0.5, width).view(1, 1, -1) * angle
    across, down = (r0 + depth) * torch.sin(alpha) / half_width, (r0 + depth) * torch.cos(alpha) / (r0 + 1)
    return _sample(x, across, 2 * down - 1, mode)


def _sample(x: torch.Tensor, across: torch.Tensor, down: torch.Tensor, mode: str) -> torch.Tensor:
    grid = torch.stack(torch.broadcast_tensors(across, down), dim=-1).to(x)
    grid = grid.expand(x.shape[0], -1, -1, -1)
    return F.grid_sample(x, grid, mode=mode, padding_mode='border', align_corners=True)


def find_sector(image: np.ndarray) -> Tuple[Sector, Tuple[int, int, int, int]]:
    """The sector of a picture whose apex lies at its top edge, in the middle, and which is black around the sector.

    Args:
        image: uint8 H x W x 3.

    Returns:
        The sector, and the box (left, top, right, bottom) of the picture that it fills; the box may be wider than the
        picture, where there is nothing.

    Raises:
        InputError: If there is no sector.
    """
    scan = find_convex_scan(image)
    lit = image[..., 0] > 0
    rows, columns = np.nonzero(lit)
    middle = image.shape[1] // 2
    outer = int(np.flatnonzero(lit[:, middle])[-1])
    radius = np.hypot(columns - middle, rows)
    # where the sector is wide, a pixel more or less is a small angle
    far = (radius > 0.5 * (scan.inner_radius + outer)) & (radius <= outer)
    if outer <= scan.inner_radius or not far.any():
        raise InputError('no sector was found: its arcs cannot be told apart in the centre column')
    angle = 2 * float(np.degrees(np.abs(np.arctan2(columns - middle, rows))[far].max()))
    if angle > 180 or angle <= 0:
        raise InputError('no sector was found: crop the image so that the apex is at the top centre')
    half = outer * math.sin(math.radians(angle / 2))
    sector = Sector(torch.tensor(angle), torch.tensor(scan.inner_radius / (outer - scan.inner_radius)))
    return sector, (round(middle - half), 0, round(middle + half) + 1, outer + 1)


# -- as the official code does it -------------------------------------------------------------------------------------

def linear_to_convex(
        image: np.ndarray, angle: float = 160., r0: int = 120, k: int = 20, top: bool = False) -> np.ndarray:
    """ASMA's conversion of a linear frame, pixel for pixel (the defaults are those of the official call).

    Args:
        image: uint8 H x W x 3.
        angle: Opening in degrees, above 0 and below 360.
        r0: Rows that are put before the image, so that the sector does not begin in a point.
        k: Rays a column.
        top: Whether row 0 lies at the apex. With the official False it lies at the outer arc.

    Returns:
        uint8 R x R x 3 with R = 2 (H + r0) - 1; fewer rows for angles above 180.

    Raises:
        InputError: If the image or the angle is none.
    """
    _check_image(image)
    if not 0 < angle < 360:
        raise InputError(f'angle is {angle}: give degrees above 0 and below 360')
    if r0 > 0:
        inner = np.ones((r0, *image.shape[1:]), np.uint8)
        image = np.concatenate([inner, image] if top else [image, inner])
    height, width = image.shape[:2]
    side, centre = 2 * height - 1, height - 1
    radius = np.arange(height) if top else height - 1 - np.arange(height)
    rays = np.deg2rad(np.linspace(-angle / 2, angle / 2, k * width))[:, None]
    row = np.ceil(np.cos(rays) * radius).astype(int) + centre  # rays, height
    column = np.ceil(np.sin(rays) * radius).astype(int) + centre
    canvas = np.zeros((side * side, image.shape[2]), np.uint8)
    # of several values for a pixel the last one stays: rays in their order, rows within a ray
    canvas[(row * side + column).ravel()] = np.repeat(image.swapaxes(0, 1), k, axis=0).reshape(-1, image.shape[2])
    canvas = canvas.reshape(side, side, -1)
    if angle > 180:
        canvas = canvas[int(height * (1 - math.sin(math.radians(angle / 2 - 90)))):]
    if not top:
        canvas = canvas[::-1]
    return np.ascontiguousarray(canvas[::-1, ::-1])


class ConvexScan(NamedTuple):
    """What `convex_to_linear` finds on an image, and needs again for its mask.

    Attributes:
        inner_radius, outer_radius: Pixels from the apex.
        x_min, x_max: Columns of the unrolled full circle in which the sector lies, the last one left out.
    """
    inner_radius: int
    outer_radius: int
    x_min: int
    x_max: int


def find_convex_scan(image: np.ndarray) -> ConvexScan:
    """Arcs and opening of a sector whose apex is at the top centre.

    Raises:
        InputError: If the centre column is empty.
    """
    _check_image(image)
    height, width = image.shape[:2]
    lit = np.flatnonzero(image[:, width // 2, 0])
    if not len(lit):
        raise InputError(
            'no field of view found in the centre column; crop the image so that the apex is at the top centre')
    inner, outer = int(lit[0]), height - 1
    if outer <= inner:
        raise InputError('the field of view is one row high; crop the image so that the apex is at the top centre')
    columns = np.flatnonzero(_unrolled(image, inner, outer)[..., 0].any(0))
    if len(columns) < 2:
        raise InputError('no field of view found around the apex; crop the image so that it is at the top centre')
    return ConvexScan(inner, outer, int(columns[0]), int(columns[-1]))


def convex_to_linear(image: np.ndarray, scan: Optional[ConvexScan] = None) -> np.ndarray:
    """ASMA's conversion of a sector, pixel for pixel.

    Args:
        image: uint8 H x W x 3, the apex in the middle of the top edge.
        scan: What was found on the image, for its mask; found anew by default.

    Returns:
        uint8 (outer - inner radius) x (x_max - x_min) x 3.

    Raises:
        InputError: If no field of view is found.
    """
    _check_image(image)
    scan = find_convex_scan(image) if scan is None else scan
    unrolled = _unrolled(image, scan.inner_radius, scan.outer_radius)
    return np.ascontiguousarray(unrolled[::-1, scan.x_min:scan.x_max][:, ::-1])


def _unrolled(image: np.ndarray, inner: int, outer: int) -> np.ndarray:
    """The full circle around the apex, row 0 the outermost radius."""
    height, width = image.shape[:2]
    columns = int(2 * math.pi * (inner + (outer - inner) // 2))
    theta = 2 * math.pi * (np.arange(columns) + 1) / columns
    radius = outer - np.arange(outer - inner)[:, None] - 1
    x = np.trunc(width // 2 + radius * np.sin(theta) + 0.5).astype(int) - 1
    y = np.trunc(-radius * np.cos(theta) + 0.5).astype(int) - 1
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return image[y.clip(0, height - 1), x.clip(0, width - 1)] * inside[..., None].astype(np.uint8)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f'the image has shape {image.shape} and type {image.dtype}: give H x W x 3 of uint8')
