"""What a segmented clip comes to: masks of every frame, areas over time, and their pictures, videos and files."""
import csv
import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.tasks import drawing
from vishub.tasks.base import Result
from vishub.tasks.clips import Clip
from vishub.tasks.video import VideoFrame, VideoWriter

__all__ = ['NOTICE', 'VideoSegmentationResult', 'overlay']

NOTICE = 'Research use only, not for diagnosis.'
_LESION = (255, 122, 48)
_SUFFIXES = ('.mp4', '.gif', '.zip', '.nii', '.gz', '.npy', '.csv', '.png', '.jpg', '.jpeg', '.webp', '.json')


def overlay(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A frame with the lesion tinted and outlined.

    Args:
        pixels: uint8 RGB (H, W, 3).
        mask: bool (H, W).
    """
    frame = Image.fromarray(pixels)
    inside = Image.fromarray(mask.astype(np.uint8) * 255)
    tinted = Image.blend(frame, Image.new('RGB', frame.size, _LESION), 0.3)
    frame = Image.composite(tinted, frame, inside)
    edge = np.asarray(inside) != np.asarray(inside.filter(ImageFilter.MinFilter(3)))
    frame.paste(_LESION, (0, 0), Image.fromarray(edge.astype(np.uint8) * 255))
    return frame


@dataclass(frozen=True, eq=False)
class VideoSegmentationResult(Result):
    """Where a model sees a lesion in a clip. Research use only.

    Attributes:
        packed: The masks, eight pixels a byte, uint8 (n, H, ceil(W / 8)); see `masks`.
        width, height: Of a frame in pixels.
        times: Seconds of the frames since the first of the clip, float64 (n,); None if the clip has none.
        spacing: Centimetres between rows and between columns; None if unknown.
        first, stride: Which frames of the clip these are: first, first + stride, …
        stills: Some frames, evenly spread: (number among the n, uint8 RGB (H, W, 3)).
        clip: Where the frames are read again, to lay the masks over them.
        model: Name of the model.
        latency_ms: Milliseconds a frame; decoding is not in it.
        num_params: Parameters of the model.
        source: Path or file name; None for values given directly.
        warnings: What was guessed or left out, one sentence each.
    """
    suffixes = ('.mp4', '.png', '.zip', '.csv', '.json')

    packed: np.ndarray = field(repr=False)
    width: int
    height: int
    times: Optional[np.ndarray] = field(repr=False)
    spacing: Optional[Tuple[float, float]]
    first: int
    stride: int
    stills: Tuple[Tuple[int, np.ndarray], ...] = field(repr=False)
    clip: Clip = field(repr=False)
    model: str
    latency_ms: float
    num_params: int
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.packed)

    def mask(self, number: int) -> np.ndarray:
        """Mask of one frame, bool (H, W)."""
        return np.unpackbits(self.packed[number], axis=1, count=self.width).astype(bool)

    @property
    def masks(self) -> np.ndarray:
        """All masks, bool (n, H, W)."""
        return np.unpackbits(self.packed, axis=2, count=self.width).astype(bool)

    @property
    def area_unit(self) -> str:
        """`cm²` where the clip has a scale, else `pixels`."""
        return 'pixels' if self.spacing is None else 'cm²'

    @property
    def areas(self) -> np.ndarray:
        """Area of the lesion in each frame in `area_unit`, float64 (n,)."""
        counts = np.array([np.count_nonzero(self.mask(number)) for number in range(len(self))], np.float64)
        return counts if self.spacing is None else counts * self.spacing[0] * self.spacing[1]

    def to_dict(self) -> Dict[str, Any]:
        """All but the masks."""
        return {
            'source': self.source,
            'model': self.model,
            'notice': NOTICE,
            'width': self.width,
            'height': self.height,
            'num_frames': len(self),
            'first': self.first,
            'stride': self.stride,
            'times': None if self.times is None else [round(float(time), 4) for time in self.times],
            'area_unit': self.area_unit,
            'areas': [round(float(area), 4) for area in self.areas],
            'latency_ms': round(self.latency_ms, 3),
            'num_params': self.num_params,
            'warnings': list(self.warnings),
        }

    def summary(self) -> Sequence[str]:
        areas = self.areas
        seen = int((areas > 0).sum())
        lines = [
            f'a lesion is marked in {seen} of {len(self)} frames, in {self.latency_ms:.0f} ms a frame '
            f'({1000 / max(self.latency_ms, 1e-9):.1f} frames/s)']
        if seen:
            lines.append(
                f'area {_figure(float(np.median(areas[areas > 0])))} {self.area_unit} in the median of these, '
                f'{_figure(float(areas.max()))} at most')
        return [*lines, NOTICE]

    # -- frames again -------------------------------------------------------------------------------------------------

    def overlays(self, side: int = 256) -> Iterator[VideoFrame]:
        """The frames with their masks laid over them, with their times; the clip is read again.

        Args:
            side: Frames whose longer side is smaller are enlarged by a whole number to about so many pixels.

        Raises:
            InputError: If the clip cannot be read any more.
        """
        scale = max(1, -(-side // max(self.width, self.height)))
        number = 0
        for place, frame in enumerate(self.clip.frames([])):
            if number == len(self):
                return
            if place < self.first or (place - self.first) % self.stride:
                continue
            pixels, mask = frame.pixels, self.mask(number)
            if scale > 1:
                pixels, mask = (values.repeat(scale, axis=0).repeat(scale, axis=1) for values in (pixels, mask))
            picture = overlay(pixels, mask)
            _stamp(picture)
            start = 0. if self.times is None else float(self.times[0])
            yield VideoFrame(np.asarray(picture), None if self.times is None else float(self.times[number]) - start)
            number += 1

    @property
    def fps(self) -> float:
        """Mean frames a second; 10 where the clip does not say."""
        if self.times is None or len(self.times) < 2:
            return 10.
        return float((len(self.times) - 1) / (self.times[-1] - self.times[0]))

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """Write the result whole or not at all.

        Args:
            path: `.mp4` (with the clip's own sound, if all of its frames are there) or `.gif` for the overlay; `.zip`
                for the masks as PNG files, 0 and 255; `.nii` or `.nii.gz` for them as NIfTI (x, y, 1, time);
                `.npy` for them as bool (n, H, W); `.csv` for the area of each frame; `.png`, `.jpg` or `.webp` for
                `plot()`; `.json` for `to_dict()`.

        Raises:
            InputError: If the path ends otherwise, or the clip cannot be read again.
            MissingExtraError: If PyAV (`.mp4`, extra `video`) or nibabel (`.nii`, extra `medical`) is not installed.
            OSError: If the folder cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in _SUFFIXES or suffix == '.gz' and not path.name.lower().endswith('.nii.gz'):
            raise InputError(
                f"cannot save a segmentation as '{path}': give a name that ends in .mp4, .gif, .zip, .nii.gz, .npy, "
                '.csv, .png, .jpg or .json')
        if suffix == '.mp4':
            whole = self.first == 0 and self.stride == 1
            with VideoWriter(path, self.fps, self.clip.sound if whole else None) as writer:
                for frame in self.overlays():
                    writer.write(frame.pixels, frame.time)
            return path
        if suffix in ('.nii', '.gz'):
            return self._save_nifti(path)
        if suffix not in ('.gif', '.zip', '.npy', '.csv'):
            return super().save(path)
        with atomic_path(path) as temporary:
            if suffix == '.gif':
                pictures = [Image.fromarray(frame.pixels) for frame in self.overlays()]
                pictures[0].save(
                    temporary, 'GIF', save_all=True, append_images=pictures[1:], loop=0,
                    duration=max(20, round(1000 / self.fps)))
            elif suffix == '.npy':
                with open(temporary, 'wb') as file:
                    np.save(file, self.masks)
            elif suffix == '.csv':
                temporary.write_text(self._table(), encoding='utf-8')
            else:
                with zipfile.ZipFile(temporary, 'w') as archive:
                    for number in range(len(self)):
                        buffer = io.BytesIO()
                        Image.fromarray(self.mask(number)).save(buffer, 'PNG')  # one bit a pixel
                        archive.writestr(f'{self.first + number * self.stride:06d}.png', buffer.getvalue())
        return path

    def _table(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator='\n')
        writer.writerow(['frame', 'seconds', f'area_{"cm2" if self.spacing else "pixels"}'])
        for number, area in enumerate(self.areas):
            time = '' if self.times is None else f'{self.times[number]:.4f}'
            writer.writerow([self.first + number * self.stride, time, f'{area:g}'])
        return text.getvalue()

    def _save_nifti(self, path: Path) -> Path:
        nibabel = import_extra('nibabel', 'medical')
        rows, columns = (10 * value for value in self.spacing) if self.spacing else (1., 1.)  # millimetres
        image = nibabel.Nifti1Image(
            self.masks.astype(np.uint8).transpose(2, 1, 0)[:, :, None], np.diag([columns, rows, 1., 1.]))
        image.header.set_xyzt_units('mm' if self.spacing else 'unknown', 'sec')
        image.header['pixdim'][4] = 1 / self.fps if self.times is not None else 1.
        with atomic_path(path) as temporary:
            if path.name.lower().endswith('.nii.gz'):
                import gzip
                # no file name and no time in the header, so that the same masks give the same file
                temporary.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
            else:
                temporary.write_bytes(image.to_bytes())
        return path

    # -- drawing ------------------------------------------------------------------------------------------------------

    def plot(self) -> Image.Image:
        """Frames with their masks above the area over time."""
        frames = self.plot_frames()
        canvas = Image.new('RGB', (frames.width, frames.height + 320), drawing.PAPER)
        canvas.paste(frames, (0, 0))
        canvas.paste(self.plot_area(frames.width), (0, frames.height))
        return canvas

    def plot_frames(self) -> Image.Image:
        """Six frames with their masks, evenly spread, in two rows."""
        places = np.unique(np.linspace(0, len(self.stills) - 1, 6).round().astype(int))
        gap, wide = 8, 240
        high = max(1, round(wide * self.height / self.width))
        rows = -(-len(places) // 3)
        canvas = Image.new('RGB', (3 * (wide + gap) - gap, rows * (high + 34)), drawing.PAPER)
        draw = ImageDraw.Draw(canvas)
        for order, place in enumerate(places):
            number, pixels = self.stills[place]
            left, top = order % 3 * (wide + gap), order // 3 * (high + 34)
            picture = overlay(pixels, self.mask(number))
            method = Image.Resampling.NEAREST if picture.width < wide else Image.Resampling.LANCZOS
            canvas.paste(picture.resize((wide, high), method), (left, top))
            draw.text((left, top + high + 5), self._label(number), fill=drawing.MUTED, font=drawing.font(16))
        return canvas

    def _label(self, number: int) -> str:
        text = f'frame {self.first + number * self.stride}'
        return text if self.times is None else f'{text}, {self.times[number]:.2f} s'

    def plot_area(self, width: int = 736, height: int = 320) -> Image.Image:
        """The chart of the area over time alone, in pixels."""
        canvas = Image.new('RGB', (width, height), drawing.PAPER)
        draw = ImageDraw.Draw(canvas)
        small = drawing.font(14)
        left, top, right, bottom = 86, 44, width - 24, height - 76
        draw.text((16, 10), f'Area of the lesion, {self.area_unit}', fill=drawing.INK, font=drawing.font(16))
        areas = self.areas
        at = np.arange(len(self)) * self.stride + self.first if self.times is None else self.times
        peak = float(areas.max()) * 1.05 or 1.
        span = float(at[-1] - at[0]) or 1.
        for share in (0., 0.5, 1.):
            y = bottom - (bottom - top) * share
            draw.line((left, y, right, y), fill=(226, 229, 236))
            text = _figure(peak * share)
            draw.text((left - 8 - small.getlength(text), y - 9), text, fill=drawing.MUTED, font=small)
            value = at[0] + span * share if len(self) > 1 or share == 0. else None
            if value is not None:
                text = f'{value:.0f}' if self.times is None else f'{value:.2f}'
                x = left + (right - left) * share
                x -= small.getlength(text) * share
                draw.text((x, bottom + 8), text, fill=drawing.MUTED, font=small)
        name = 'frame' if self.times is None else 'seconds'
        draw.text((right - small.getlength(name), bottom + 26), name, fill=drawing.MUTED, font=small)
        draw.text((16, height - 24), NOTICE, fill=drawing.MUTED, font=small)
        points = [
            (left + (right - left) * float(where - at[0]) / span, bottom - (bottom - top) * float(area) / peak)
            for where, area in zip(at, areas)]
        if len(points) > 1:
            draw.line(points, fill=_LESION, width=3, joint='curve')
        for x, y in points if len(points) <= 60 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_LESION)
        return canvas


def _stamp(picture: Image.Image) -> None:
    """The notice in the lower left corner, on what is there."""
    size = max(9, min(16, picture.width // 28))
    draw = ImageDraw.Draw(picture)
    draw.text((4, picture.height - 4), 'research use only', fill=(235, 235, 235), font=drawing.font(size), anchor='ls',
              stroke_width=1, stroke_fill=(0, 0, 0))


def _figure(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
