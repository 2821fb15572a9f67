"""The one place of this task where clips are read: frames of one size come out, or an `InputError`.

Frames are made small one by one as they are decoded, and no more of them are kept than were asked for: a 4K video of
an hour needs no more memory than a short one.
"""
import collections
import dataclasses
import io
import itertools
import os
from pathlib import Path
from typing import Any, Callable, Deque, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence, UnidentifiedImageError

from vishub.errors import InputError
from vishub.tasks.clips import VideoInput, is_frames
from vishub.tasks.images import FORMATS, MAX_PIXELS, SUFFIXES, decode_image
from vishub.tasks.video import decode_video

__all__ = ['MAX_BYTES', 'Clip', 'centre_crop', 'read_clip']

MAX_BYTES = 1 << 30  # of the frames kept of one clip
_RIGHT = 'give a video, an animated GIF or WebP, a folder of frames, or a .npy file (frames, height, width[, channels])'


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames, ready for a model.

    Attributes:
        frames: float32 (T, C, H, W); pictures from 0 to 1, measurements as they are.
        times: Seconds of each frame from the beginning of the video, float64 (T,); None if the source has none.
        first: Which frame of the source the first one is, from 0.
        source: Path or file name; None for values given directly.
        warnings: What was guessed or left out, one sentence each.
    """
    frames: np.ndarray
    times: Optional[np.ndarray]
    first: int
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()


class _Frame(NamedTuple):
    """A frame that may never be needed: `size` (width, height) is known before `fitted()` makes it small."""
    size: Tuple[int, int]
    time: Optional[float]
    fitted: Callable[[], np.ndarray]


class _Frames(NamedTuple):
    frames: Iterator[_Frame]
    name: str  # for messages
    source: Optional[str]


def read_clip(
        video: VideoInput,
        frame: Tuple[int, int, int],
        count: int,
        *,
        start: int = 0,
        stride: int = 1,
        picture: bool = True,
) -> Clip:
    """Read at most `count` frames.

    Pictures of another size are cropped at their centre to the shape asked for and scaled; colours become grey, or
    grey colours, as the model has one channel or three.

    Args:
        video: One of

            * path of a video, an animated GIF, WebP or PNG, a folder of frames (sorted by name), or a `.npy` file;
            * a video's content as bytes, or a file object opened for reading bytes;
            * array or tensor (T, H, W), (T, H, W, C) or (T, C, H, W): uint8, or floating point from 0 to 1;
            * list of frames: PIL images, or arrays (H, W) or (H, W, C).
        frame: C, H, W wanted.
        count: How many frames at most.
        start: The first one, from 0; a negative number counts from the end.
        stride: Take every so manieth frame.
        picture: False for measurements: arrays alone, of exactly the shape of `frame`, taken as they are.

    Raises:
        InputError: If there is no frame, the video is damaged, or its size changes; if a number is out of range.
    """
    if count < 1 or stride < 1:
        raise InputError(f'count is {count} and stride {stride}: give 1 or more')
    bytes_a_frame = 4 * int(np.prod(frame))
    kept = max(count, -start)
    if kept * bytes_a_frame > MAX_BYTES:
        raise InputError(
            f'{kept:,} frames of {frame[2]} x {frame[1]} pixels need more than {MAX_BYTES >> 20:,} MB: ask for at most '
            f'{MAX_BYTES // bytes_a_frame:,}')
    frames, name, source = _open(video, frame, picture)
    warnings: List[str] = []
    try:
        chosen, first, seen = _choose(_one_size(frames, name, warnings), count, start, stride)
    finally:
        close = getattr(frames, 'close', None)
        if close is not None:
            close()
    if not chosen:
        if not seen:
            raise InputError(f'{name} has no frames: {_RIGHT}')
        raise InputError(f'{name} has {seen} frame{"s" * (seen > 1)}, none from number {start} on: give another start')
    times: Optional[np.ndarray] = None
    if all(time is not None for time, _ in chosen):
        times = np.array([time for time, _ in chosen], np.float64)
        gaps = np.diff(times)
        if len(gaps) and gaps.min() <= 0:
            times = None
            warnings.append('The times of the frames do not rise, so they were left out.')
        elif len(gaps) and gaps.max() > 1.1 * gaps.min() + 0.002:
            warnings.append(
                f'The frames are {1000 * gaps.min():.0f} to {1000 * gaps.max():.0f} ms apart; the model takes them '
                'as evenly spaced.')
    return Clip(np.stack([values for _, values in chosen]), times, first, source, tuple(warnings))


def _choose(
        frames: Iterator[_Frame], count: int, start: int, stride: int,
) -> Tuple[List[Tuple[Optional[float], np.ndarray]], int, int]:
    """The frames wanted as (time, values), the number of the first, and how many there were as far as was looked."""
    if start < 0:
        last: Deque[Tuple[Optional[float], np.ndarray]] = collections.deque(maxlen=-start)
        seen = 0
        for item in frames:
            last.append((item.time, item.fitted()))
            seen += 1
        if seen < -start:
            return [], 0, seen
        return list(itertools.islice(last, 0, count * stride, stride)), seen + start, seen
    chosen: List[Tuple[Optional[float], np.ndarray]] = []
    seen = 0
    for number, item in enumerate(frames):
        seen = number + 1
        if number >= start and (number - start) % stride == 0:
            chosen.append((item.time, item.fitted()))
            if len(chosen) == count:
                break
    return chosen, start, seen


def _one_size(frames: Iterator[_Frame], name: str, warnings: List[str]) -> Iterator[_Frame]:
    """The frames as they come, as long as they have one size; a video that breaks off ends with a warning."""
    size: Optional[Tuple[int, int]] = None
    number = 0
    while True:
        try:
            item = next(frames)
        except StopIteration:
            return
        except InputError:
            if number == 0:
                raise
            warnings.append(f'The video is damaged behind frame {number}; those before it were used.')
            return
        if size is not None and item.size != size:
            raise InputError(
                f'{name} changes its size at frame {number} from {size[0]} x {size[1]} to {item.size[0]} x '
                f'{item.size[1]}: cut the clip there')
        size = item.size
        yield item
        number += 1


# -- sources ----------------------------------------------------------------------------------------------------------

def _open(video: VideoInput, frame: Tuple[int, int, int], picture: bool) -> _Frames:
    if isinstance(video, torch.Tensor):
        video = video.detach().cpu()
        video = (video.float() if video.is_floating_point() else video).numpy()
    if isinstance(video, np.ndarray):
        return _Frames(_array_frames(video, 'the array', frame, picture), 'the array', None)
    if isinstance(video, (list, tuple)):
        if not video:
            raise InputError(f'the list holds no frames: {_RIGHT}')
        if not is_frames(video):
            raise InputError(f'the list does not hold the frames of one clip: {_RIGHT}')
        if not picture:
            raise InputError('this model takes measurements: give an array, not a list of pictures')
        return _Frames((_picture(item, frame, 'the list') for item in video), 'the list', None)
    if isinstance(video, (str, os.PathLike)):
        source = os.fspath(video)
        source = os.fsdecode(source) if isinstance(source, bytes) else source
        return _open_path(source, frame, picture)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return _open_file(io.BytesIO(video), f'the video of {len(video):,} bytes', None, frame, picture)
    read = getattr(video, 'read', None)
    if callable(read):
        content = read()
        if not isinstance(content, (bytes, bytearray)):
            raise InputError("the file object gives text, not bytes: open it with open(path, 'rb')")
        own = getattr(video, 'name', None)
        own = own if isinstance(own, str) else None
        return _open_file(io.BytesIO(content), f"'{own}'" if own else 'the file object', own, frame, picture)
    raise InputError(f'cannot read a clip from a {type(video).__name__}: {_RIGHT}')


def _open_path(source: str, frame: Tuple[int, int, int], picture: bool) -> _Frames:
    name = f"'{source}'" if source.isprintable() else repr(source)
    path = Path(source)
    try:
        exists, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f'{name} cannot be opened ({error}): {_RIGHT}') from error
    if not exists:
        raise InputError(f'{name} does not exist: {_RIGHT}')
    if folder:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != '.')
        if not files:
            raise InputError(f'the folder {name} holds no pictures: {_RIGHT}')
        if not picture:
            raise InputError(f'this model takes measurements: give a .npy file, not the pictures of {name}')
        return _Frames((_picture(file, frame, name) for file in files), f'the folder {name}', source)
    if path.suffix.lower() == '.npy':
        try:
            array = np.load(path, mmap_mode='r', allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f'{name} is no array in the .npy format ({error})') from error
        return _Frames(_array_frames(array, name, frame, picture), name, source)
    try:
        file = open(path, 'rb')  # noqa: SIM115  closed by the generator that reads it
    except OSError as error:
        raise InputError(f'{name} cannot be opened ({error})') from error
    return _open_file(file, name, source, frame, picture)


def _open_file(file: Any, name: str, source: Optional[str], frame: Tuple[int, int, int], picture: bool) -> _Frames:
    if not picture:
        file.close()
        raise InputError(f'this model takes measurements: give an array or a .npy file, not {name}')
    if not file.read(1):
        file.close()
        raise InputError(f'{name} is empty (0 bytes): {_RIGHT}')
    file.seek(0)
    try:
        Image.init()
        animation = Image.open(file, formats=tuple(known for known in FORMATS if known in Image.OPEN))
    except UnidentifiedImageError:
        file.seek(0)
        return _Frames(_video_frames(file, name, frame), name, source)
    except Exception as error:  # a decoder may raise anything on a damaged header
        file.close()
        raise InputError(f'{name} is damaged ({error}): {_RIGHT}') from error
    return _Frames(_animation_frames(animation, file, name, frame), name, source)


def _picture(item: Any, frame: Tuple[int, int, int], where: str) -> _Frame:
    try:
        image = decode_image(item).image
    except InputError as error:
        raise InputError(f'a frame of {where}: {error}') from error
    return _Frame(image.size, None, lambda: _fit_image(image, frame))


def _animation_frames(
        animation: Image.Image, file: Any, name: str, frame: Tuple[int, int, int]) -> Iterator[_Frame]:
    width, height = animation.size
    if width * height > MAX_PIXELS:
        raise InputError(f'{name} has frames of {width:,} x {height:,} pixels: scale it down first')
    time: Optional[float] = 0.
    try:
        for shown in ImageSequence.Iterator(animation):
            image = shown.convert('RGB')  # a copy: the next frame is drawn into the same picture
            duration = shown.info.get('duration')
            yield _Frame(image.size, time, lambda image=image: _fit_image(image, frame))  # type: ignore[misc]
            # browsers show frames without a duration for a tenth of a second
            time = None if time is None else time + (float(duration) if duration else 100.) / 1000
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f'{name} is damaged or incomplete ({error})') from error
    finally:
        file.close()


def _video_frames(file: Any, name: str, frame: Tuple[int, int, int]) -> Iterator[_Frame]:
    try:
        for decoded, time in decode_video(file, name):
            yield _Frame(
                (decoded.width, decoded.height), time,
                lambda decoded=decoded: _fit_video_frame(decoded, frame))  # type: ignore[misc]
    finally:
        file.close()


def _array_frames(
        array: np.ndarray, name: str, frame: Tuple[int, int, int], picture: bool) -> Iterator[_Frame]:
    channels, height, width = frame
    shape = ' x '.join(map(str, array.shape)) or 'no dimension'
    last = array.ndim == 4 and array.shape[-1] in (1, 3, 4) and array.shape[1:] != frame
    found = 1 if array.ndim == 3 else array.shape[-1 if last else 1] if array.ndim == 4 else 0
    if array.ndim not in (3, 4) or found not in {1, 3, 4, channels} or 0 in array.shape[1:]:
        raise InputError(
            f'{name} has shape {shape}: give (frames, height, width), (frames, height, width, channels) or (frames, '
            'channels, height, width)')
    if array.dtype != np.uint8 and array.dtype.kind != 'f':
        raise InputError(f'{name} has values of type {array.dtype}: give uint8, or floating point')
    size = (array.shape[-2], array.shape[-3]) if last else (array.shape[-1], array.shape[-2])  # width, height
    if not picture and (found, size) != (channels, (width, height)):
        raise InputError(
            f'{name} has {found} channel(s) of {size[1]} x {size[0]}; this model takes measurements of {channels} '
            f'channel(s) on a grid of {height} x {width}')
    for number in range(len(array)):
        def fitted(number: int = number) -> np.ndarray:
            values = np.asarray(array[number])
            values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1) if last else values
            return _fit_values(values, f'frame {number} of {name}', frame, picture)
        yield _Frame(size, None, fitted)


# -- one size ---------------------------------------------------------------------------------------------------------

def centre_crop(width: int, height: int, to: Tuple[int, int]) -> Tuple[float, float, float, float]:
    """The box (left, top, right, bottom) in the middle of a picture that has the shape of `to` (width, height)."""
    scale = min(width / to[0], height / to[1])
    across, down = to[0] * scale, to[1] * scale
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _fit_image(image: Image.Image, frame: Tuple[int, int, int]) -> np.ndarray:
    """RGB picture -> float32 (C, H, W), 0 to 1."""
    channels, height, width = frame
    if channels not in (1, 3):
        raise InputError(f'the model takes {channels} channels, a video has one or three: give an array')
    if image.size != (width, height):
        box = centre_crop(*image.size, (width, height))
        # the mean of what a pixel covers, as moving digits are scaled; enlarged smoothly
        smaller = box[2] - box[0] >= 2 * width
        method = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC
        image = image.resize((width, height), method, box=box)
    values = np.asarray(image.convert('L') if channels == 1 else image, np.float32) / 255
    return values[None] if channels == 1 else np.ascontiguousarray(values.transpose(2, 0, 1))


def _fit_video_frame(decoded: Any, frame: Tuple[int, int, int]) -> np.ndarray:
    """As `_fit_image`; large frames are first scaled down by FFmpeg, without a large copy in RGB."""
    _, height, width = frame
    turn = getattr(decoded, 'rotation', 0)  # phones store upright videos lying; a scaled frame has forgotten it
    shrink = min(decoded.width / width, decoded.height / height)
    if shrink > 2:
        decoded = decoded.reformat(
            width=round(2 * decoded.width / shrink), height=round(2 * decoded.height / shrink), format='rgb24',
            interpolation='AREA')
    image = decoded.to_image()
    return _fit_image(image.rotate(turn, expand=True) if turn else image, frame)


def _fit_values(values: np.ndarray, name: str, frame: Tuple[int, int, int], picture: bool) -> np.ndarray:
    """(c, h, w) of any size -> float32 (C, H, W)."""
    if values.dtype == np.uint8:
        if not picture:
            raise InputError(f'{name} has pixels of type uint8; this model takes measurements as floating point')
        out = values.astype(np.float32) / 255
    else:
        out = values.astype(np.float32)
        if not np.isfinite(out).all():
            raise InputError(f'{name} has values that are not finite (NaN or infinity)')
        low, high = float(out.min()), float(out.max())
        if picture and (low < -1e-3 or high > 1 + 1e-3):
            hint = 'divide by 255, or give uint8' if low >= 0 and 1 < high <= 255 else 'scale them to 0..1'
            raise InputError(f'{name} has values {low:.4g}..{high:.4g} where 0..1 is expected: {hint}')
    channels, height, width = frame
    if not picture or out.shape == frame:
        return np.ascontiguousarray(out)
    if out.shape[0] == 4:  # transparency is left out
        out = out[:3]
    if out.shape[0] != channels:
        if channels == 1:
            out = (0.299 * out[:1] + 0.587 * out[1:2] + 0.114 * out[2:]).astype(np.float32)
        elif out.shape[0] == 1:
            out = np.repeat(out, channels, axis=0)
        else:
            raise InputError(f'{name} has {out.shape[0]} channels, the model takes {channels}')
    if out.shape[1:] != (height, width):
        left, top, right, bottom = map(round, centre_crop(out.shape[2], out.shape[1], (width, height)))
        cut = np.ascontiguousarray(out[None, :, top:max(bottom, top + 1), left:max(right, left + 1)])
        scaled = F.interpolate(torch.from_numpy(cut), (height, width), mode='bicubic', antialias=True)
        out = scaled[0].clamp(0, 1).numpy()
    return out
