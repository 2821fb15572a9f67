"""Drawing tracks: boxes into frames (supervision), and scores and templates as charts (Pillow)."""
from typing import List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw

from vishub.errors import import_extra
from vishub.tasks import drawing

__all__ = ['draw_box', 'page', 'score_chart', 'stack_pictures', 'template_sheet', 'thumbnail']

Colour = Tuple[int, int, int]

_SURE: Colour = (24, 128, 92)
_UNSURE: Colour = (214, 92, 36)
_GRID: Colour = (226, 229, 236)


def draw_box(pixels: np.ndarray, box: np.ndarray, confidence: float, reliability: float) -> np.ndarray:
    """A copy of a frame with the box and its scores: green where reliable (above 0.5), orange where not.

    Args:
        pixels: uint8 RGB (H, W, 3).
        box: x, y, w, h in pixels.

    Raises:
        MissingExtraError: If supervision is not installed.
    """
    sv = import_extra('supervision', 'video')
    size = (pixels.shape[1], pixels.shape[0])
    detections = sv.Detections(
        xyxy=np.array([[box[0], box[1], box[0] + box[2], box[1] + box[3]]]), class_id=np.array([0]))
    colour = sv.Color(*_colour(reliability)[::-1])  # supervision takes pixels for BGR
    thickness = sv.calculate_optimal_line_thickness(size)
    drawn = sv.BoxAnnotator(color=colour, thickness=thickness).annotate(np.array(pixels), detections)
    label = sv.LabelAnnotator(
        color=colour, text_scale=sv.calculate_optimal_text_scale(size), text_thickness=max(1, thickness // 2),
        text_padding=4)
    return label.annotate(drawn, detections, labels=[f'score {confidence:.2f}  reliable {reliability:.2f}'])


def thumbnail(pixels: np.ndarray, box: np.ndarray, reliability: float) -> Image.Image:
    """A small frame with its box, which is given in its pixels."""
    picture = Image.fromarray(pixels)
    x, y, w, h = (float(value) for value in box)
    ImageDraw.Draw(picture).rectangle((x - 1, y - 1, x + w, y + h), outline=_colour(reliability), width=2)
    return picture


def stack_pictures(pictures: Sequence[Tuple[int, Image.Image]], width: int = 900, columns: int = 4) -> Image.Image:
    """Numbered pictures in rows, at most eight of them, evenly spread."""
    places = np.linspace(0, len(pictures) - 1, min(len(pictures), 8)).round().astype(int)
    chosen = [pictures[place] for place in places]
    gap = 10
    wide = (width - (columns - 1) * gap) // columns
    high = max(round(picture.height * wide / picture.width) for _, picture in chosen)
    rows = -(-len(chosen) // columns)
    canvas = Image.new('RGB', (width, rows * (high + 26)), drawing.PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, (number, picture) in enumerate(chosen):
        left, top = place % columns * (wide + gap), place // columns * (high + 26)
        canvas.paste(drawing.fit(picture, wide, high), (left, top))
        draw.text((left, top + high + 4), f'frame {number}', fill=drawing.MUTED, font=drawing.font(14))
    return canvas


def score_chart(
        confidence: np.ndarray,
        reliability: np.ndarray,
        changes: np.ndarray,
        times: Optional[np.ndarray],
        width: int = 900,
        height: int = 260,
) -> Image.Image:
    """Two curves from 0 to 1 over the frames, and a tick at each frame number of `changes`."""
    canvas = Image.new('RGB', (width, height), drawing.PAPER)
    draw = ImageDraw.Draw(canvas)
    small = drawing.font(14)
    left, top, right, bottom = 40, 34, width - 12, height - 34
    draw.text((left, 6), 'confidence', fill=drawing.ACCENT, font=small)
    draw.text((left + 100, 6), 'reliability', fill=_SURE, font=small)
    draw.text((left + 190, 6), '|  a template joined the collection', fill=drawing.MUTED, font=small)
    for share in (0., 0.5, 1.):
        y = bottom - (bottom - top) * share
        draw.line((left, y, right, y), fill=_GRID)
        draw.text((8, y - 8), f'{share:g}', fill=drawing.MUTED, font=small)
    last = max(len(confidence) - 1, 1)

    def place(number: float, value: float) -> Tuple[float, float]:
        return left + (right - left) * number / last, bottom - (bottom - top) * value

    for number in changes:
        x, _ = place(float(number), 0)
        draw.line((x, top, x, bottom), fill=(170, 176, 190))
    # of many frames, the mean of those that share a column of pixels
    count = min(len(confidence), right - left)
    edges = np.linspace(0, len(confidence), count + 1).astype(int)
    for values, colour in ((confidence, drawing.ACCENT), (reliability, _SURE)):
        points = [place((a + b - 1) / 2, float(values[a:b].mean())) for a, b in zip(edges[:-1], edges[1:])]
        draw.line(points, fill=colour, width=2, joint='curve')
    for share in (0., 0.25, 0.5, 0.75, 1.):
        number = round(last * share)
        text = str(number) if times is None else f'{times[number]:.1f} s'
        x, _ = place(number, 0)
        draw.text((min(max(x - small.getlength(text) / 2, 0), width - small.getlength(text)), bottom + 8), text,
                  fill=drawing.MUTED, font=small)
    return canvas


def template_sheet(
        templates: Sequence[Tuple[int, float, np.ndarray, bool]], width: int = 900, side: int = 84) -> Image.Image:
    """Templates as (frame, reliability, pixels, in use) in rows; those in use have a frame."""
    columns = max(1, width // (side + 16))
    rows = -(-len(templates) // columns)
    canvas = Image.new('RGB', (width, rows * (side + 44)), drawing.PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, (number, reliability, pixels, in_use) in enumerate(templates):
        left, top = place % columns * (side + 16) + 4, place // columns * (side + 44) + 4
        canvas.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        if in_use:
            draw.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=_SURE, width=3)
        text = 'first frame' if number == 0 else f'{number}: {reliability:.2f}'
        draw.text((left, top + side + 6), text, fill=drawing.MUTED, font=drawing.font(13))
    return canvas


def page(title: str, facts: str, parts: List[Image.Image]) -> Image.Image:
    """A heading and pictures one under the other."""
    margin, header, gap = 28, 64, 18
    width = max(part.width for part in parts)
    canvas = Image.new(
        'RGB', (width + 2 * margin, header + sum(part.height + gap for part in parts) + margin), drawing.PAPER)
    draw = ImageDraw.Draw(canvas)
    left = canvas.width - margin - drawing.font(15).getlength(facts)
    draw.text((left, 28), facts, fill=drawing.MUTED, font=drawing.font(15))
    draw.text((margin, 22), drawing.elide(title, drawing.font(21), left - 2 * margin), fill=drawing.INK,
              font=drawing.font(21))
    top = header
    for part in parts:
        canvas.paste(part, (margin, top))
        top += part.height + gap
    return canvas


def _colour(reliability: float) -> Colour:
    return _SURE if reliability > 0.5 else _UNSURE
