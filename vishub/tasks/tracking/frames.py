"""The frames of whatever a user calls a video, one by one: however long and large it is, one frame is in memory."""
import io
import os
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
from PIL import Image

from vishub.errors import InputError
from vishub.tasks.images import SUFFIXES, decode_image
from vishub.tasks.tracking.crops import as_image
from vishub.tasks.video import VideoFrame, read_video, video_info

__all__ = ['Frames', 'VideoInput', 'open_frames']

VideoInput = Union[str, os.PathLike, bytes, BinaryIO, np.ndarray, torch.Tensor, Sequence[Any]]

_RIGHT = 'give a video, a folder of frames, or frames as uint8 (frames, height, width, 3)'


class Frames(NamedTuple):
    """A video that can be gone through more than once.

    Attributes:
        name: For messages.
        source: Path or file name; None for values given directly.
        count: How many frames there may be, for progress; 0 if unknown.
        read: Gives the frames from the first on.
        has_sound: Whether `source` is a video file, whose sound an annotated copy can carry over.
    """
    name: str
    source: Optional[str]
    count: int
    read: Callable[[], Iterator[VideoFrame]]
    has_sound: bool = False


def open_frames(video: VideoInput) -> Frames:
    """Look at an input without reading its frames.

    Args:
        video: One of

            * path of a video file (any that FFmpeg reads, an animated GIF too), of a folder of frames (sorted by
              name), or of a `.npy` file;
            * a video's content as bytes, or a file object opened for reading bytes;
            * uint8 array (T, H, W, 3) or (T, H, W), or tensor (T, 3, H, W);
            * list of frames: PIL images, or arrays.

    Raises:
        InputError: If it is none of these, is not there, or has no frames.
    """
    if isinstance(video, torch.Tensor):
        if video.ndim == 4:
            video = video.permute(0, 2, 3, 1)
        video = video.detach().cpu().numpy()
    if isinstance(video, np.ndarray):
        return _array(video, 'the array', None)
    if isinstance(video, (list, tuple)):
        if not video:
            raise InputError(f'the list holds no frames: {_RIGHT}')
        frames = list(video)
        return Frames('the list', None, len(frames), lambda: (VideoFrame(as_image(item), None) for item in frames))
    if isinstance(video, (bytes, bytearray, memoryview)):
        return _content(bytes(video), f'the video of {len(video):,} bytes', None)
    if isinstance(video, (str, os.PathLike)):
        return _path(os.fsdecode(video))
    read = getattr(video, 'read', None)
    if not callable(read):
        raise InputError(f'cannot track in a {type(video).__name__}: {_RIGHT}')
    content = read()
    if not isinstance(content, (bytes, bytearray)):
        raise InputError("the file object gives text, not bytes: open it with open(path, 'rb')")
    own = getattr(video, 'name', None)
    own = own if isinstance(own, str) else None
    return _content(bytes(content), f"'{own}'" if own else 'the file object', own)


def _path(source: str) -> Frames:
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
        return Frames(f'the folder {name}', source, len(files), lambda: (
            VideoFrame(np.asarray(decode_image(file).image), None) for file in files))
    if path.suffix.lower() == '.npy':
        try:
            return _array(np.load(path, mmap_mode='r', allow_pickle=False), name, source)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f'{name} is no array in the .npy format ({error})') from error
    if path.stat().st_size == 0:
        raise InputError(f'{name} is empty (0 bytes): {_RIGHT}')
    if path.suffix.lower() in SUFFIXES - {'.gif', '.webp'}:
        with Image.open(path) as image:
            if getattr(image, 'n_frames', 1) == 1:
                raise InputError(f'{name} is a picture, which has nothing to follow: {_RIGHT}')
    info = video_info(source, name)
    return Frames(name, source, info.num_frames, lambda: read_video(source, name), has_sound=info.has_sound)


def _content(content: bytes, name: str, source: Optional[str]) -> Frames:
    if not content:
        raise InputError(f'{name} is empty (0 bytes): {_RIGHT}')
    return Frames(name, source, 0, lambda: read_video(io.BytesIO(content), name))


def _array(array: np.ndarray, name: str, source: Optional[str]) -> Frames:
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] != 3) or array.dtype != np.uint8:
        shape = ' x '.join(map(str, array.shape)) or 'no dimension'
        raise InputError(f'{name} has shape {shape} and type {array.dtype}: {_RIGHT}')
    if not len(array):
        raise InputError(f'{name} has no frames: {_RIGHT}')
    return Frames(name, source, len(array), lambda: (
        VideoFrame(as_image(np.asarray(frame)), None) for frame in array))
