"""A scan with its mask, drawn: one plane, or a sheet of the three planes that show most."""
from typing import List, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw

from vishub.tasks import drawing

__all__ = ['AXES', 'busiest', 'colours', 'grey_values', 'plane_picture', 'sheet']

AXES = ('axial', 'coronal', 'sagittal')  # planes across D, H, W
_COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (0, 114, 178))


def colours(count: int) -> List[Tuple[int, int, int]]:
    """Colours of classes 1, 2, …: Okabe & Ito's, which the colour-blind can tell apart; beyond seven they return."""
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]


def grey_values(data: np.ndarray) -> np.ndarray:
    """A scan (D, H, W) as uint8, from its 0.5 to its 99.5 percentile (of at most a million voxels)."""
    step = max(1, int(np.ceil((data.size / 1e6) ** (1 / 3))))
    low, high = np.percentile(data[::step, ::step, ::step], (0.5, 99.5))
    out = np.empty(data.shape, np.uint8)
    for plane, values in zip(out, data):  # plane by plane: temporaries of the whole take room
        plane[:] = ((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255)
    return out


def busiest(mask: np.ndarray, axis: int) -> int:
    """The plane across `axis` with the most foreground; the middle one where there is none."""
    counts = (mask > 0).sum(tuple(a for a in range(3) if a != axis))
    return int(counts.argmax()) if counts.any() else mask.shape[axis] // 2


def plane_picture(
        grey: np.ndarray,
        mask: np.ndarray,
        axis: int,
        index: int,
        spacing: Sequence[float],
        *,
        opacity: float = 0.45,
        side: int = 360,
) -> Image.Image:
    """One plane with the mask over it, as radiologists look at it: the patient's right on the left, head or front up.

    Args:
        grey: uint8 (D, H, W).
        mask: uint8 of that shape.
        axis: 0 axial, 1 coronal, 2 sagittal.
        index: Which plane.
        spacing: Millimetres along D, H, W; voxels are drawn as oblong as they are.
        opacity: Of the mask, 0 to 1.
        side: Pixels of the longer side.
    """
    plane, labels = (np.take(values, index, axis)[::-1] for values in (grey, mask))  # rows from the head, or the front
    if axis < 2:
        plane, labels = plane[:, ::-1], labels[:, ::-1]  # W runs to the right of the patient
    rgb = np.repeat(plane[..., None], 3, -1).astype(np.float32)
    kinds = colours(int(labels.max()))
    for kind, colour in enumerate(kinds, 1):
        inside = labels == kind
        rgb[inside] = (1 - opacity) * rgb[inside] + opacity * np.array(colour, np.float32)
    picture = Image.fromarray(rgb.astype(np.uint8))
    heights = [s for i, s in enumerate(spacing) if i != axis]
    extent = (picture.height * heights[0], picture.width * heights[1])
    scale = side / max(extent)
    size = (max(1, round(extent[1] * scale)), max(1, round(extent[0] * scale)))
    method = Image.Resampling.NEAREST if min(size) > 3 * max(plane.shape) else Image.Resampling.BICUBIC
    return picture.resize(size, method)


def sheet(
        grey: np.ndarray,
        mask: np.ndarray,
        spacing: Sequence[float],
        title: str,
        facts: str,
        rows: Sequence[Tuple[str, str]],
) -> Image.Image:
    """Three planes, the bare scan above the mask over it, and a legend.

    Args:
        grey, mask, spacing: As for `plane_picture`.
        title, facts: Heading, and a line in small letters.
        rows: (name, amount) of the classes 1, 2, ….
    """
    side, margin, gap, top, legend = 300, 28, 14, 84, 250
    width = 2 * margin + 3 * side + 2 * gap + 24 + legend
    height = top + 2 * side + gap + 60
    canvas = Image.new('RGB', (width, height), drawing.PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 20), drawing.elide(title, drawing.font(22), width - 2 * margin), fill=drawing.INK,
              font=drawing.font(22))
    draw.text((margin, 50), drawing.elide(facts, drawing.font(15), width - 2 * margin), fill=drawing.MUTED,
              font=drawing.font(15))
    for axis, name in enumerate(AXES):
        left, index = margin + axis * (side + gap), busiest(mask, axis)
        for row, opacity in enumerate((0., 0.5)):
            picture = plane_picture(grey, mask, axis, index, spacing, opacity=opacity, side=side)
            box = (left, top + row * (side + gap))
            draw.rectangle((*box, box[0] + side - 1, box[1] + side - 1), fill=(0, 0, 0))
            canvas.paste(picture, (box[0] + (side - picture.width) // 2, box[1] + (side - picture.height) // 2))
        draw.text((left, top + 2 * side + gap + 6), f'{name}, {index + 1} of {mask.shape[axis]}', fill=drawing.MUTED,
                  font=drawing.font(15))
    left = margin + 3 * side + 2 * gap + 24
    for number, ((name, amount), colour) in enumerate(zip(rows, colours(len(rows)))):
        y = top + number * 34
        if y > height - 90:
            draw.text((left, y), '…', fill=drawing.MUTED, font=drawing.font(16))
            break
        draw.rounded_rectangle((left, y, left + 18, y + 18), 4, fill=colour)
        amount_width = drawing.font(16).getlength(amount)
        text = drawing.elide(name, drawing.font(16), legend - 40 - amount_width)
        draw.text((left + 28, y), text, fill=drawing.INK, font=drawing.font(16))
        draw.text((left + legend - amount_width, y), amount, fill=drawing.MUTED, font=drawing.font(16))
    note = "For research only. The patient's right is on the left of axial and coronal planes."
    draw.text((margin, height - 32), note, fill=drawing.MUTED, font=drawing.font(14))
    return canvas
