"""Whatever a user calls a clip: RGB frames of their own size, one by one, as often as asked for.

However long and large it is, one frame is in memory.
"""
import io
import os
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

from vishub.errors import InputError
from vishub.tasks.dicom import is_dicom, open_cine
from vishub.tasks.images import FORMATS, MAX_PIXELS, SUFFIXES, decode_image
from vishub.tasks.video import VIDEO_SUFFIXES, VideoFrame, read_video, video_info

__all__ = ['Clip', 'VideoInput', 'is_frames', 'open_clip']

VideoInput = Union[str, os.PathLike, bytes, BinaryIO, np.ndarray, torch.Tensor, Sequence[Any]]

_RIGHT = 'give a video, a DICOM clip, an animated GIF or WebP, a folder of frames, or an array (frames, height, width' \
         '[, 3])'


class Clip(NamedTuple):
    """A clip that can be read from its beginning as often as wanted.

    Attributes:
        read: Gives the frames, uint8 RGB (H, W, 3), with their times; raises InputError at a damaged one.
        name: For messages.
        source: Path or file name; None for values given directly.
        num_frames: How many there are, as far as the source tells; 0 if it does not.
        spacing: Centimetres between rows and columns; None if unknown.
        sound: File whose sound belongs to the frames.
        warnings: What was guessed or left out, one sentence each.
    """
    read: Callable[[], Iterator[VideoFrame]]
    name: str
    source: Optional[str] = None
    num_frames: int = 0
    spacing: Optional[Tuple[float, float]] = None
    sound: Optional[str] = None
    warnings: Tuple[str, ...] = ()

    def frames(self, warnings: Optional[List[str]] = None) -> Iterator[VideoFrame]:
        """The frames as long as they are whole and of one size.

        Args:
            warnings: A clip that breaks off behind its first frame ends with a sentence in here.

        Raises:
            InputError: If there is no frame, the first one is damaged, or the size changes.
        """
        size: Optional[Tuple[int, ...]] = None
        number = 0
        frames = self.read()
        while True:
            try:
                frame = next(frames)
            except StopIteration:
                break
            except InputError:
                if number == 0:
                    raise
                if warnings is not None:
                    warnings.append(f'The clip is damaged behind frame {number}; those before it were used.')
                break
            height, width = frame.pixels.shape[:2]
            if height * width > MAX_PIXELS or not height * width:
                raise InputError(f'{self.name} has frames of {width:,} x {height:,} pixels: scale it first')
            if size is not None and size != (width, height):
                raise InputError(
                    f'{self.name} changes its size at frame {number} from {size[0]} x {size[1]} to {width} x {height}: '
                    'cut the clip there')
            size = width, height
            yield frame
            number += 1
        if number == 0:
            raise InputError(f'{self.name} has no frames: {_RIGHT}')


def open_clip(video: VideoInput) -> Clip:
    """Open a clip; frames are decoded when they are read.

    Args:
        video: One of

            * path of a video, a DICOM file (single or multi-frame), an animated GIF, WebP or PNG, a picture, a folder
              of frames (sorted by name), or a `.npy` file;
            * the content of such a file as bytes, or a file object opened for reading bytes;
            * array or tensor (T, H, W), (T, H, W, 3) or (T, 3, H, W): uint8, or floating point from 0 to 1;
            * list of frames: PIL images, or arrays (H, W) or (H, W, 3).

    Raises:
        InputError: If it is none of these.
    """
    if isinstance(video, torch.Tensor):
        video = video.detach().cpu()
        video = (video.float() if video.is_floating_point() else video).numpy()
    if isinstance(video, np.ndarray):
        return _array(video, 'the array', None)
    if isinstance(video, (list, tuple)):
        if not is_frames(video):
            raise InputError(f'the list does not hold the frames of one clip: {_RIGHT}')
        return _pictures(list(video), 'the list', None)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return _content(bytes(video), f'the clip of {len(video):,} bytes', None)
    if isinstance(video, (str, os.PathLike)):
        return _path(Path(os.fsdecode(os.fspath(video))))
    read = getattr(video, 'read', None)
    if callable(read):
        content = read()
        if not isinstance(content, (bytes, bytearray)):
            raise InputError("the file object gives text, not bytes: open it with open(path, 'rb')")
        own = getattr(video, 'name', None)
        own = own if isinstance(own, str) else None
        return _content(bytes(content), f"'{own}'" if own else 'the file object', own)
    raise InputError(f'cannot read a clip from a {type(video).__name__}: {_RIGHT}')


def is_frames(video: Any) -> bool:
    """Whether a list holds the frames of one clip (pictures), and not several clips."""
    return isinstance(video, (list, tuple)) and len(video) > 0 and all(
        isinstance(item, Image.Image)
        or isinstance(item, (np.ndarray, torch.Tensor)) and (
            item.ndim == 2 or item.ndim == 3 and item.shape[-1] in (1, 3, 4))
        for item in video)


def _path(path: Path) -> Clip:
    source = str(path)
    name = f"'{source}'" if source.isprintable() else repr(source)
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != '.')
            if not files:
                raise InputError(f'the folder {name} holds no pictures: {_RIGHT}')
            return _pictures(files, f'the folder {name}', source)
        if not path.exists():
            raise InputError(f'{name} does not exist: {_RIGHT}')
        if path.suffix.lower() == '.npy':
            return _array(np.load(path, mmap_mode='r', allow_pickle=False), name, source)
        with open(path, 'rb') as file:
            return _file(file, path, name, source)
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f'{name} cannot be opened ({error}): {_RIGHT}') from error


def _content(content: bytes, name: str, source: Optional[str]) -> Clip:
    return _file(io.BytesIO(content), content, name, source)


def _file(file: BinaryIO, again: Union[Path, bytes], name: str, source: Optional[str]) -> Clip:
    """A clip by its first bytes. `again` is what is opened when its frames are read."""
    if not file.read(1):
        raise InputError(f'{name} is empty (0 bytes): {_RIGHT}')
    if is_dicom(file):
        cine = open_cine(again, name)
        return Clip(lambda: open_cine(again, name).frames, name, source, cine.num_frames, cine.spacing, None,
                    cine.warnings)
    Image.init()
    try:
        with Image.open(file, formats=tuple(known for known in FORMATS if known in Image.OPEN)) as picture:
            count = getattr(picture, 'n_frames', 1)
        return Clip(lambda: _animation(again, name), name, source, count)
    except UnidentifiedImageError:
        pass
    except Exception as error:  # a decoder may raise anything on a damaged header
        raise InputError(f'{name} is damaged ({error}): {_RIGHT}') from error
    if isinstance(again, bytes):
        return Clip(lambda: read_video(io.BytesIO(again), name), name, source)
    try:
        info = video_info(again, name)
    except InputError as error:
        if again.suffix.lower() in VIDEO_SUFFIXES:
            raise
        raise InputError(str(error).partition(': ')[0] + f': {_RIGHT}') from error
    return Clip(
        lambda: read_video(again, name), name, source, info.num_frames, sound=str(again) if info.has_sound else None)


def _animation(again: Union[Path, bytes], name: str) -> Iterator[VideoFrame]:
    time = 0.
    try:
        with Image.open(io.BytesIO(again) if isinstance(again, bytes) else again) as picture:
            for shown in ImageSequence.Iterator(picture):
                pixels = np.asarray(shown.convert('RGB'))
                duration = shown.info.get('duration')  # of a WebP known when it is decoded
                yield VideoFrame(pixels, time)
                time += (float(duration) if duration else 100.) / 1000  # as browsers show frames without one
    except Exception as error:  # as above
        raise InputError(f'{name} is damaged or incomplete ({error})') from error


def _pictures(items: List[Any], name: str, source: Optional[str]) -> Clip:
    def read() -> Iterator[VideoFrame]:
        for item in items:
            try:
                yield VideoFrame(np.asarray(decode_image(item).image), None)
            except InputError as error:
                raise InputError(f'a frame of {name}: {error}') from error

    return Clip(read, name, source, len(items))


def _array(array: np.ndarray, name: str, source: Optional[str]) -> Clip:
    first = array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3)  # channels before rows
    if array.ndim not in (3, 4) or 0 in array.shape[1:] or array.ndim == 4 and array.shape[1 if first else 3] not in (
            1, 3):
        shape = ' x '.join(map(str, array.shape)) or 'no dimension'
        raise InputError(f'{name} has shape {shape}: give (frames, height, width), (frames, height, width, 3) or '
                         '(frames, 3, height, width)')

    def read() -> Iterator[VideoFrame]:
        for number, frame in enumerate(array):
            try:
                image = decode_image(np.asarray(frame.transpose(1, 2, 0) if first else frame)).image
            except InputError as error:
                raise InputError(f'frame {number} of {name}: {error}') from error
            yield VideoFrame(np.asarray(image), None)

    return Clip(read, name, source, len(array))
