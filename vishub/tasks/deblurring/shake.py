"""Camera shake: random paths of a camera as blur kernels, and what they do to a photograph.

A sensor adds up light, so blurring happens in linear light: sRGB values are decoded, convolved and encoded again.
Noise is added behind that, and 8 bits are what is left, as in a file.
"""
import functools
import math
from typing import Optional

import numpy as np

from vishub.errors import import_extra

__all__ = ['MAX_LENGTH', 'MIN_LENGTH', 'blur', 'camera_shake', 'from_linear', 'to_linear']

# Longest side of a shake's path in pixels.
MIN_LENGTH, MAX_LENGTH = 5, 17


def camera_shake(generator: np.random.Generator, length: float) -> np.ndarray:
    """Draw the kernel of a hand-held exposure.

    The camera drifts at a changing speed, its direction wanders, and now and then it is jerked back. The path is a
    dense sequence of points, spread bilinearly over the pixels.

    Args:
        generator: Source of randomness.
        length: Longer side of the path's bounding box, in pixels; at least 0.

    Returns:
        float32 (S, S), S odd, at least 3; it sums to 1, and its centre of mass lies within half a pixel of the middle.
    """
    count = 400
    turning = generator.uniform(0.02, 0.15)  # radians a point
    angle = generator.uniform(0, 2 * math.pi) + np.cumsum(generator.normal(0, turning, count))
    angle += np.cumsum(generator.random(count) < 2 / count) * generator.uniform(0.5, 1) * math.pi  # jerks
    speed = np.exp(np.cumsum(generator.normal(0, 0.05, count)))
    path = np.cumsum(speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1), 0)  # points, (y, x)
    path *= length / max(np.ptp(path, axis=0).max(), 1e-9)
    path -= path.mean(0)

    radius = max(1, math.ceil(np.abs(path).max()))
    kernel = np.zeros((2 * radius + 2, 2 * radius + 2), np.float64)
    whole = np.floor(path).astype(int)
    share = path - whole
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - share[:, 0]) * np.abs(1 - dx - share[:, 1])
            np.add.at(kernel, (whole[:, 0] + radius + dy, whole[:, 1] + radius + dx), weight)
    kernel = kernel[:-1, :-1]  # nothing reaches the last row and column but rounding
    return (kernel / kernel.sum()).astype(np.float32)


@functools.cache
def _linear_table() -> np.ndarray:
    return to_linear(np.arange(256, dtype=np.float32) / 255)


def to_linear(image: np.ndarray) -> np.ndarray:
    """sRGB values to linear light (IEC 61966-2-1): uint8, or float 0..1 -> float32 0..1."""
    if image.dtype == np.uint8:
        return _linear_table()[image]
    image = image.astype(np.float32)
    return np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4).astype(np.float32)


def from_linear(light: np.ndarray) -> np.ndarray:
    """Linear light to sRGB values, float32; below 0 and above 1 is cut."""
    light = light.clip(0, 1).astype(np.float32)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)


def blur(
        image: np.ndarray, kernel: np.ndarray, noise: float = 0.005, generator: Optional[np.random.Generator] = None,
) -> np.ndarray:
    """Shake a photograph.

    Args:
        image: uint8, H x W x 3; its edges are mirrored.
        kernel: As `camera_shake` gives it.
        noise: Standard deviation of the noise, where white is 1.
        generator: Source of the noise; none is added without it.

    Returns:
        uint8, H x W x 3.

    Raises:
        MissingExtraError: If OpenCV is not installed (extra `train`).
    """
    cv2 = import_extra('cv2', 'train')
    # filter2D correlates
    light = cv2.filter2D(to_linear(image), -1, kernel[::-1, ::-1].copy(), borderType=cv2.BORDER_REFLECT_101)
    shaken = from_linear(light)
    if generator is not None and noise > 0:
        shaken += noise * generator.standard_normal(shaken.shape, dtype=np.float32)
    return (shaken.clip(0, 1) * 255).round().astype(np.uint8)
