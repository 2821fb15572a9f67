"""Drawing results with Pillow alone: text that fits, bars, and heat maps laid over pictures."""
import functools
from typing import Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ['ACCENT', 'INK', 'MUTED', 'PAPER', 'draw_bars', 'elide', 'fit', 'font', 'heat_colours', 'overlay_heat']

Font = Union[ImageFont.FreeTypeFont, ImageFont.ImageFont]

PAPER = (255, 255, 255)
INK = (24, 28, 38)
MUTED = (104, 112, 128)
ACCENT = (46, 98, 217)
_ACCENT_PALE = (151, 180, 236)
_TRACK = (236, 239, 245)

# Dark blue over magenta to yellow: brightness rises all the way, so that it reads in grey and to the colour-blind.
_HEAT = np.array([(13, 8, 80), (95, 10, 160), (170, 35, 145), (222, 80, 95), (250, 145, 55), (245, 235, 60)])


@functools.lru_cache(maxsize=16)
def font(size: int) -> Font:
    """Pillow's own typeface at `size` pixels, the same on every machine."""
    return ImageFont.load_default(size)


def elide(text: str, typeface: Font, width: float) -> str:
    """`text`, its end replaced by an ellipsis if it is wider than `width` pixels."""
    if typeface.getlength(text) <= width:
        return text
    while text and typeface.getlength(text + '...') > width:
        text = text[:-1]
    return text.rstrip(' ,') + '...'


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image` scaled up or down as far as it fits into `width` x `height`, its shape kept."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def heat_colours(heat: np.ndarray) -> np.ndarray:
    """Values 0..1 of any shape -> their colours, uint8, with a last dimension of 3."""
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(heat, stops, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlay_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Lay a heat map over a picture: the picture goes grey, and shows through where the map is low.

    Args:
        image: RGB picture, H x W.
        heat: H x W, 0..1.
    """
    opacity = Image.fromarray((255 * (0.25 + 0.45 * heat)).round().astype(np.uint8))
    return Image.composite(Image.fromarray(heat_colours(heat)), image.convert('L').convert('RGB'), opacity)


def draw_bars(
        draw: ImageDraw.ImageDraw,
        origin: Tuple[int, int],
        width: int,
        row_height: int,
        rows: Sequence[Tuple[str, float]],
) -> None:
    """Draw a list of labelled bars, each row a name, its share in per cent and a bar beneath.

    Args:
        draw: Where to draw.
        origin: Left and top in pixels.
        width: Length of a full bar in pixels.
        row_height: Pixels a row; at least 40.
        rows: (name, share 0..1); the first row is drawn in the accent colour.
    """
    left, top = origin
    text_size, bar_height = round(row_height * 0.36), round(row_height * 0.2)
    typeface = font(text_size)
    for row, (name, share) in enumerate(rows):
        y = top + row * row_height
        number = '<0.1%' if 0 < share < 5e-4 else f'{share:.1%}'
        number_width = typeface.getlength(number)
        ink = INK if row == 0 else MUTED
        draw.text((left, y), elide(name, typeface, width - number_width - text_size), fill=ink, font=typeface)
        draw.text((left + width - number_width, y), number, fill=ink, font=typeface)
        y += round(text_size * 1.5)
        draw.rounded_rectangle((left, y, left + width, y + bar_height), bar_height // 2, fill=_TRACK)
        # A bar shorter than its own height could not be rounded; so small a share gets a dot.
        filled = max(round(share * width), bar_height)
        colour = ACCENT if row == 0 else _ACCENT_PALE
        draw.rounded_rectangle((left, y, left + filled, y + bar_height), bar_height // 2, fill=colour)
