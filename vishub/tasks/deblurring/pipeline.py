"""Deblurring: a shaken photograph of any size in, a sharper one out, and the blur that the model believes in."""
import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union, cast

import numpy as np
import torch
from PIL import Image, ImageDraw

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.models.deeprftv2 import DIVISOR, MIN_SIZE, DeepRFTv2, half_size
from vishub.tasks import drawing
from vishub.tasks.base import Pipeline, Progress, Result, pretrained_cfg_of
from vishub.tasks.deblurring.photo import Photo, read_photo
from vishub.tasks.deblurring.shake import to_linear
from vishub.tasks.deblurring.tiling import mirrored, run_tiles
from vishub.tasks.images import ImageInput
from vishub.tasks.video import VIDEO_SUFFIXES, VideoWriter, read_video, video_info

__all__ = ['DeblurResult', 'DeblurringPipeline', 'VideoDeblurResult', 'blur_between']

# The official code's tiles, for weights that were trained on crops of 256.
_LARGEST_TILE = 512
# Pixels around a tile that the half-size picture needs, so that it is a part of the whole one's.
_MARGIN = 4
_NUM_KERNELS = 16


@dataclass(frozen=True, eq=False)
class DeblurResult(Result):
    """A sharper photograph.

    Attributes:
        photo: The one that was given, as stored.
        pixels: The sharpened one, the same kind of pixels.
        blur: The blur that turns `pixels` into the given ones, float32 (33, 33), sums to 1; see `blur_between`.
        kernels: The model's own filters in feature space, the strongest 16 channels', float32 (n, S, S) with S up to
            65, from the tile in the middle; None where the model has none.
        model: Name of the model.
        latency_ms: Milliseconds for all tiles.
        num_params: Parameters of the model.
        num_tiles: Tiles.
        warnings: What was converted or left out, one sentence each.
    """
    photo: Photo = field(repr=False)
    pixels: np.ndarray = field(repr=False)
    blur: np.ndarray = field(repr=False)
    kernels: Optional[np.ndarray] = field(repr=False)
    model: str
    latency_ms: float
    num_params: int
    num_tiles: int
    warnings: Tuple[str, ...] = ()

    @property
    def suffixes(self) -> Tuple[str, ...]:  # type: ignore[override]  # those of the original's format
        return (self.photo.suffix, '.json')

    @property
    def image(self) -> Image.Image:
        """The sharpened photograph, 8 bits, upright."""
        return self.photo.picture(self.pixels)

    @property
    def original(self) -> Image.Image:
        """The given photograph, 8 bits, upright."""
        return self.photo.picture()

    @property
    def residual(self) -> Image.Image:
        """What was added, upright, RGB: grey is nothing, and differences are shown four times as large."""
        before, after = (np.asarray(image.convert('RGB'), np.int16) for image in (self.original, self.image))
        return Image.fromarray((128 + 4 * (after - before)).clip(0, 255).astype(np.uint8))

    def to_dict(self) -> Dict[str, Any]:
        height, width, channels = self.pixels.shape
        return {
            'source': self.photo.source, 'model': self.model, 'width': width, 'height': height, 'channels': channels,
            'bits': 8 * self.pixels.dtype.itemsize, 'tiles': self.num_tiles, 'latency_ms': round(self.latency_ms, 3),
            'change': round(float(np.abs(
                self.pixels[::4, ::4].astype(np.float32) - self.photo.pixels[::4, ::4]).mean()) / self.photo.white, 5),
            'blur': {'width': _extent(self.blur, 1), 'height': _extent(self.blur, 0),
                     'kernel': [[round(float(v), 5) for v in row] for row in self.blur]},
            'num_params': self.num_params, 'warnings': list(self.warnings),
        }

    def summary(self) -> Sequence[str]:
        height, width = self.pixels.shape[:2]
        return [
            f'{width} x {height} pixels in {self.num_tiles} tile(s), {self.latency_ms:.0f} ms; estimated blur '
            f'{_extent(self.blur, 1)} x {_extent(self.blur, 0)} pixels']

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """Write the sharpened photograph with the given one's metadata, or `to_dict()` for `.json`.

        Raises:
            InputError: If the path ends neither so nor like a picture.
        """
        if Path(path).suffix.lower() == '.json':
            return super().save(path)
        return self.photo.save(path, self.pixels)

    def kernel_picture(self, side: int = 480) -> Image.Image:
        """The estimated blur, and beneath it the model's filters (red adds, blue takes away), RGB."""
        columns, gap = 8, 4
        cell = (side - gap * (columns - 1)) // columns
        shown = self.kernels if self.kernels is not None else np.zeros((0, 1, 1), np.float32)
        rows = math.ceil(len(shown) / columns)
        canvas = Image.new('RGB', (side, side // 2 + rows * (cell + gap) + gap), drawing.PAPER)
        blur = Image.fromarray(drawing.heat_colours(np.sqrt(self.blur / max(self.blur.max(), 1e-9))))
        canvas.paste(blur.resize((side // 2, side // 2), Image.Resampling.NEAREST), (side // 4, 0))
        for number, kernel in enumerate(shown):
            share = kernel / max(np.abs(kernel).max(), 1e-9)
            share = np.sign(share) * np.abs(share) ** 0.5
            colours = np.stack([1 + share.clip(-1, 0), 1 - np.abs(share), 1 - share.clip(0, 1)], -1)
            picture = Image.fromarray((colours * 255).astype(np.uint8)).resize((cell, cell), Image.Resampling.NEAREST)
            place = (number % columns * (cell + gap), side // 2 + gap + number // columns * (cell + gap))
            canvas.paste(picture, place)
        return canvas

    def plot(self) -> Image.Image:
        """Given, sharpened, what was added, and the blur, in one RGB picture."""
        side, gap, header = 420, 24, 44
        panels = [
            ('given', drawing.fit(self.original.convert('RGB'), side, side)),
            ('sharpened', drawing.fit(self.image.convert('RGB'), side, side)),
            ('added, four times', drawing.fit(self.residual, side, side)),
            ('estimated blur, filters', drawing.fit(self.kernel_picture(), side, side)),
        ]
        height = max(picture.height for _, picture in panels)
        width = gap + sum(picture.width + gap for _, picture in panels)
        canvas = Image.new('RGB', (width, header + height + gap), drawing.PAPER)
        draw, left = ImageDraw.Draw(canvas), gap
        for title, picture in panels:
            draw.text((left, 12), title, fill=drawing.INK, font=drawing.font(18))
            canvas.paste(picture, (left, header))
            left += picture.width + gap
        return canvas


@dataclass(frozen=True, eq=False)
class VideoDeblurResult(Result):
    """A sharper video.

    Attributes:
        path: Where it lies; `save` copies it from there.
        num_frames: Frames.
        size: Width and height.
        fps: Frames a second.
        first: The first frame's result.
    """
    path: Path
    num_frames: int
    size: Tuple[int, int]
    fps: float
    model: str
    latency_ms: float
    first: DeblurResult = field(repr=False)
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()
    suffixes = ('.mp4', '.json')

    def to_dict(self) -> Dict[str, Any]:
        return {
            'source': self.source, 'model': self.model, 'width': self.size[0], 'height': self.size[1],
            'frames': self.num_frames, 'fps': self.fps, 'latency_ms': round(self.latency_ms, 3),
            'warnings': list(self.warnings)}

    def plot(self) -> Image.Image:
        """The first frame's result."""
        return self.first.plot()

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """`.mp4` for the video; else as any result."""
        if Path(path).suffix.lower() != '.mp4':
            return super().save(path)
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(self.path.read_bytes())
        return Path(path)


class DeblurringPipeline(Pipeline):
    """Sharpen photographs with a deblurring model.

        pipe = DeblurringPipeline('deeprftv2_tiny.bsds500')
        pipe('shaken.jpg').save('sharp.jpg')

    Args:
        model: See `Pipeline`; a `DeepRFTv2`, or any module that takes and gives RGB (B, 3, H, W) in [0, 1] with sides
            that are multiples of 8.
        device: See `Pipeline`.
    """

    task = 'deblurring'
    default_model = 'deeprftv2_tiny.bsds500'

    def __call__(
            self,
            image: Union[ImageInput, Sequence[ImageInput]],
            tile_size: Optional[int] = None,
            tile_overlap: Optional[int] = None,
            strength: float = 1.0,
            progress: Optional[Progress] = None,
    ) -> Any:
        """Sharpen one photograph, a video file (frame by frame, see `video`), or a list of photographs.

        Memory is that of the photograph twice, and of one tile's activations, however large it is.

        Args:
            image: Anything that `vishub.tasks.images.decode_image` takes, or a list of such, or the path of a video.
            tile_size: Side of the tiles in pixels, a multiple of 8, at least 24. None takes twice the side of the crops
                that the weights were trained on, at most 512 (the official 512 for crops of 256): a network that takes
                means and spectra over the picture does best near the size it knows.
            tile_overlap: Pixels that tiles share, a multiple of 8, at most half a tile; None takes a quarter.
            strength: How much of the change is applied, 0 to 1.
            progress: Called with (tiles done, tiles in all); of a list and a video with (pictures done, all).

        Returns:
            `DeblurResult`, `VideoDeblurResult`, or a list of results.

        Raises:
            InputError: If a picture cannot be decoded, or an option is out of range.
        """
        options: Dict[str, Any] = dict(tile_size=tile_size, tile_overlap=tile_overlap, strength=strength)
        self._checked(**options)
        if isinstance(image, (list, tuple)):
            return self.run_batches(image, lambda batch: [self(item, **options) for item in batch], 1, progress)
        if isinstance(image, (str, os.PathLike)) and Path(os.fsdecode(image)).suffix.lower() in VIDEO_SUFFIXES:
            return self.video(image, progress=progress, **options)
        return self.sharpen(read_photo(cast(ImageInput, image)), progress=progress, **options)

    def sharpen(
            self,
            photo: Photo,
            tile_size: Optional[int] = None,
            tile_overlap: Optional[int] = None,
            strength: float = 1.0,
            progress: Optional[Progress] = None,
    ) -> DeblurResult:
        """Sharpen a photograph that was read already; options as of a call."""
        tile_size, tile_overlap = self._checked(tile_size, tile_overlap, strength)
        height, width = photo.pixels.shape[:2]
        padded = [max(MIN_SIZE, math.ceil(length / DIVISOR) * DIVISOR) for length in (height, width)]
        out = photo.pixels.copy()
        kernels: Dict[float, np.ndarray] = {}

        def run(top: int, left: int, tile_height: int, tile_width: int) -> np.ndarray:
            rows, columns = (
                mirrored(mirrored(np.arange(start - _MARGIN, start + length + _MARGIN), all_), stored)
                for start, length, all_, stored in (
                    (top, tile_height, padded[0], height), (left, tile_width, padded[1], width)))
            rgb = photo.rgb(photo.pixels[rows[:, None], columns[None]])
            given = torch.from_numpy(rgb).permute(2, 0, 1)[None].to(self.device)
            # how far the tile's middle is from the picture's
            distance = math.hypot(top + tile_height / 2 - padded[0] / 2, left + tile_width / 2 - padded[1] / 2)
            wanted = not kernels or distance < min(kernels)
            sharp, filters = self._run(given, wanted)
            if filters is not None:
                kernels.clear()
                kernels[distance] = filters
            result = sharp[0].permute(1, 2, 0).cpu().numpy()
            if not np.isfinite(result).all():
                raise InputError(f"'{self.name}' gave values that are not finite: its weights are damaged")
            if strength < 1:
                inner = rgb[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
                result = inner + strength * (result - inner)
            return result

        def write(top: int, rows: np.ndarray) -> None:
            bottom = min(top + len(rows), height)
            if top < bottom:
                photo.stored(rows[:bottom - top, :width], out[top:bottom])

        start = time.perf_counter()
        num_tiles = run_tiles((padded[0], padded[1]), tile_size, tile_overlap, run, write, progress)
        latency_ms = (time.perf_counter() - start) * 1000
        return DeblurResult(
            photo=photo, pixels=out, blur=_blur_of(photo, out), kernels=next(iter(kernels.values()), None),
            model=self.name, latency_ms=latency_ms, num_params=self.num_params, num_tiles=num_tiles,
            warnings=photo.warnings)

    def _checked(
            self, tile_size: Optional[int], tile_overlap: Optional[int], strength: float) -> Tuple[int, int]:
        """Tile size and overlap to use; raises InputError if an option is out of range."""
        if tile_size is None:
            trained_on = pretrained_cfg_of(self.model).get('input_size')
            tile_size = min(_LARGEST_TILE, 2 * trained_on[1]) if trained_on else _LARGEST_TILE
            tile_size = max(MIN_SIZE, tile_size // DIVISOR * DIVISOR)
        if tile_overlap is None:
            tile_overlap = tile_size // 4 // DIVISOR * DIVISOR
        if tile_size % DIVISOR or tile_size < MIN_SIZE:
            raise InputError(f'tile_size is {tile_size}: give a multiple of {DIVISOR}, at least {MIN_SIZE}')
        if tile_overlap % DIVISOR or not 0 <= tile_overlap <= tile_size // 2:
            raise InputError(
                f'tile_overlap is {tile_overlap}: give a multiple of {DIVISOR} from 0 to half of tile_size')
        if not 0 <= strength <= 1:
            raise InputError(f'strength is {strength}: give 0 to 1')
        return tile_size, tile_overlap

    def _run(self, given: torch.Tensor, want_kernels: bool) -> Tuple[torch.Tensor, Optional[np.ndarray]]:
        """A tile with its margin (1, 3, h, w) -> the sharp tile without it, and the strongest filters if wanted."""
        inner = given[..., _MARGIN:-_MARGIN, _MARGIN:-_MARGIN].contiguous()
        with torch.inference_mode():
            if not isinstance(self.model, DeepRFTv2):
                return self.model(inner).float(), None
            half = half_size(given)[..., _MARGIN // 2:-_MARGIN // 2, _MARGIN // 2:-_MARGIN // 2]
            if not want_kernels:
                return self.model(inner, half).float(), None
            sharp, kernels = self.model(inner, half, return_kernels=True)
            strongest = kernels[0].flatten(1).norm(dim=1).topk(min(_NUM_KERNELS, kernels.shape[1])).indices
            return sharp.float(), kernels[0, strongest].float().cpu().numpy()

    def video(
            self,
            video: Union[str, os.PathLike],
            tile_size: Optional[int] = None,
            tile_overlap: Optional[int] = None,
            strength: float = 1.0,
            progress: Optional[Progress] = None,
    ) -> VideoDeblurResult:
        """Sharpen a video frame by frame; the times of its frames and its sound stay.

        Args:
            video: Path of the file.
            tile_size, tile_overlap, strength: As of a photograph.
            progress: Called with (frames done, frames in all by the file's header).

        Raises:
            InputError: If the file is not there, is no video, holds no frames, or breaks off.
            MissingExtraError: If PyAV is not installed (extra `video`).
        """
        name = os.fsdecode(os.fspath(video))
        info = video_info(name)
        handle, temporary = tempfile.mkstemp(suffix='.mp4')
        os.close(handle)
        path, first, latency_ms = Path(temporary), None, 0.
        try:
            if progress is not None:
                progress(0, max(1, info.num_frames))
            with VideoWriter(path, info.fps, sound_from=name) as writer:
                for frame in read_video(name):
                    result = self.sharpen(Photo(frame.pixels), tile_size, tile_overlap, strength)
                    first = first or result
                    latency_ms += result.latency_ms
                    writer.write(result.pixels, frame.time)
                    if progress is not None:
                        progress(writer.num_frames, max(info.num_frames, writer.num_frames))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        assert first is not None  # read_video refuses a video without frames
        return VideoDeblurResult(
            path, writer.num_frames, info.size, info.fps, self.name, latency_ms, first, name, tuple(writer.warnings))


def blur_between(sharp: np.ndarray, blurred: np.ndarray, size: int = 33, noise: float = 1e-3) -> np.ndarray:
    """The blur that best turns one picture into another, by least squares on their gradients in linear light.

    K = sum conj(S_i) B_i / (sum |S_i|^2 + noise * mean), over the horizontal and vertical gradients i.

    Args:
        sharp, blurred: uint8 or float 0..1, H x W x 3.
        size: Side of the kernel, odd.
        noise: Weight of the regularisation.

    Returns:
        float32 (size, size), not negative, sums to 1; a single point where the pictures are flat.
    """
    grey = [to_linear(image).mean(-1) for image in (sharp, blurred)]
    height, width = grey[0].shape
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    top, bottom = np.zeros((height, width // 2 + 1), complex), np.zeros((height, width // 2 + 1))
    for axis in (0, 1):
        s, b = (np.fft.rfft2(np.gradient(image, axis=axis) * window) if image.shape[axis] > 1 else 0 for image in grey)
        top += np.conj(s) * b
        bottom += np.abs(s) ** 2
    kernel = np.zeros((size, size), np.float32)
    kernel[size // 2, size // 2] = 1
    if bottom.mean() < 1e-12:
        return kernel
    spread = np.fft.irfft2(top / (bottom + noise * bottom.mean()), s=(height, width))
    half_y, half_x = min(size // 2, (height - 1) // 2), min(size // 2, (width - 1) // 2)
    rows, columns = np.arange(-half_y, half_y + 1), np.arange(-half_x, half_x + 1)
    part = spread[rows[:, None] % height, columns[None] % width]
    part = np.where(part < 0.05 * part.max(), 0, part)  # what is left of the noise
    if part.sum() <= 0:
        return kernel
    kernel[:] = 0
    kernel[size // 2 + rows[:, None], size // 2 + columns[None]] = part / part.sum()
    return kernel


def _blur_of(photo: Photo, pixels: np.ndarray, side: int = 512) -> np.ndarray:
    """`blur_between` of the middle of a photograph."""
    height, width = (min(length, side) for length in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    part = (slice(top, top + height), slice(left, left + width))
    return blur_between(photo.rgb(pixels[part]), photo.rgb(photo.pixels[part]))


def _extent(kernel: np.ndarray, axis: int) -> int:
    """Pixels along an axis within which 95 % of a kernel's weight lies."""
    sums = np.cumsum(kernel.sum(1 - axis))
    return int(np.searchsorted(sums, 0.975) - np.searchsorted(sums, 0.025)) + 1
