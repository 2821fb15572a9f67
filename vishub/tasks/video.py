"""Video files: the one place where they are decoded and written (PyAV, extra `video`).

Frames come one by one and go one by one, so the memory is that of a few frames, however long the video. Frames keep
their times (phones record at a changing rate), lying phone videos are turned upright, and sound is carried over.
"""
import contextlib
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path

__all__ = ['VIDEO_SUFFIXES', 'VideoFrame', 'VideoInfo', 'VideoWriter', 'decode_video', 'read_video', 'video_info']

VIDEO_SUFFIXES = ('.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v')
_RIGHT = 'give a video file such as .mp4, .mov, .avi or .mkv'
_CLOCK = 90_000  # ticks a second in written files, as in MPEG: fits 24, 25, 30 and 60 frames a second
_SOUND_IN_MP4 = {'aac', 'mp3', 'ac3', 'eac3', 'opus', 'flac', 'alac'}  # carried over as they are; others become AAC


class VideoInfo(NamedTuple):
    """What the header says.

    Attributes:
        size: Width and height of the upright frames.
        fps: Mean frames a second; 25 where the header does not say.
        num_frames: By the header, or by duration and rate; 0 if unknown. Headers err: for progress only.
        has_sound: Whether there is a sound track.
    """
    size: Tuple[int, int]
    fps: float
    num_frames: int
    has_sound: bool


class VideoFrame(NamedTuple):
    """Attributes:
        pixels: uint8 RGB, upright, H x W x 3.
        time: Seconds since the first frame; None if the file does not tell.
    """
    pixels: np.ndarray
    time: Optional[float]


@contextlib.contextmanager
def _opened(video: Union[str, os.PathLike, BinaryIO], name: str) -> Iterator[Tuple[Any, Any]]:
    """The container and its first video stream."""
    av = import_extra('av', 'video')
    try:
        container = av.open(os.fspath(video) if isinstance(video, (str, os.PathLike)) else video)
    except FileNotFoundError as error:
        raise InputError(f'{name} does not exist: {_RIGHT}') from error
    except (av.FFmpegError, ValueError, OSError) as error:
        raise InputError(f'{name} is not a video, whatever its name says: {_RIGHT}') from error
    with container:
        if not container.streams.video:
            others = ' and '.join(sorted({stream.type for stream in container.streams})) or 'nothing'
            raise InputError(f'{name} has no picture, only {others}: {_RIGHT}')
        stream = container.streams.video[0]
        try:
            stream.thread_type = 'AUTO'
            stream.codec_context.thread_count = 4  # each holds a frame, and there may be a hundred cores
        except (AttributeError, ValueError, RuntimeError) as error:  # no decoder: there is no codec context
            raise InputError(f'{name} is stored in a way that the installed PyAV cannot decode: {_RIGHT}') from error
        yield container, stream


def decode_video(
        video: Union[str, os.PathLike, BinaryIO], name: str,
) -> Iterator[Tuple[Any, Optional[float]]]:
    """Decode frame by frame.

    Args:
        video: Path, or file object opened for reading bytes (it stays open).
        name: How messages call it.

    Yields:
        PyAV's frame, as it is stored (see its `rotation`), and its seconds since the first one.

    Raises:
        InputError: If it is no video, has no picture, or breaks off.
        MissingExtraError: If PyAV is not installed (extra `video`).
    """
    with _opened(video, name) as (container, stream):
        av = import_extra('av', 'video')
        begin: Optional[float] = None
        try:
            for frame in container.decode(stream):
                begin = frame.time if begin is None else begin
                yield frame, None if frame.time is None or begin is None else frame.time - begin
        except av.FFmpegError as error:
            raise InputError(f'{name} is damaged or incomplete ({error})') from error


def read_video(video: Union[str, os.PathLike, BinaryIO], name: Optional[str] = None) -> Iterator[VideoFrame]:
    """The upright frames of a video as RGB pixels; see `decode_video`.

    Raises:
        InputError: Also if it holds no frame.
    """
    name = name or (f"'{os.fsdecode(video)}'" if isinstance(video, (str, os.PathLike)) else 'the video')
    empty = True
    for frame, time in decode_video(video, name):
        empty = False
        pixels = frame.to_ndarray(format='rgb24')
        turns = round(getattr(frame, 'rotation', 0) / 90) % 4  # phones store upright videos lying
        yield VideoFrame(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels, time)
    if empty:
        raise InputError(f'{name} has no frame that can be read: {_RIGHT}')


def video_info(video: Union[str, os.PathLike], name: Optional[str] = None) -> VideoInfo:
    """What a video's header says; raises as `decode_video`."""
    name = name or f"'{os.fsdecode(video)}'"
    first = next(decode_video(video, name), None)
    if first is None:
        raise InputError(f'{name} has no frame that can be read: {_RIGHT}')
    with _opened(video, name) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        count = stream.frames or round(seconds * fps)
        turned = round(getattr(first[0], 'rotation', 0) / 90) % 2
        size = (first[0].width, first[0].height)
        return VideoInfo(size[::-1] if turned else size, fps, count, bool(container.streams.audio))


class VideoWriter:
    """Write an MP4 (H.264) frame by frame: whole, or not at all.

        with VideoWriter('out.mp4', fps=25, sound_from='in.mp4') as writer:
            for frame in read_video('in.mp4'):
                writer.write(frame.pixels, frame.time)

    Players want even sides (4:2:0), so an odd side loses its last row or column.

    Args:
        path: Where to; the file appears when the block ends without an error.
        fps: Frames a second, for frames written without a time.
        sound_from: Video whose sound track is carried over, unchanged where MP4 can hold it, else as AAC.

    Attributes:
        warnings: What could not be carried over, one sentence each.
        num_frames: Frames written.
    """

    def __init__(
            self,
            path: Union[str, os.PathLike],
            fps: float = 25.,
            sound_from: Union[str, os.PathLike, None] = None,
    ) -> None:
        import_extra('av', 'video')
        self.path, self.fps, self.num_frames = Path(path), fps, 0
        self.warnings: List[str] = []
        self._sound_from = sound_from
        self._last_tick = -1
        self._container: Any = None
        self._stream: Any = None
        self._sound: Optional[_Sound] = None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> 'VideoWriter':
        import av

        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._container = stack.enter_context(av.open(str(temporary), 'w', format='mp4'))
            self._exit = stack.pop_all()
        return self

    def write(self, pixels: np.ndarray, time: Optional[float] = None) -> None:
        """Add a frame.

        Args:
            pixels: uint8 RGB, H x W x 3, all frames of one size.
            time: Seconds since the first frame, rising; by default `fps` says.

        Raises:
            InputError: If the size is another than the first frame's.
        """
        import av

        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        if self._stream is None:
            self._begin(width, height)
        elif (self._stream.width, self._stream.height) != (width, height):
            raise InputError(
                f'frame {self.num_frames} has {pixels.shape[1]} x {pixels.shape[0]} pixels, those before it '
                f'{self._stream.width} x {self._stream.height}: a video has one size')
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format='rgb24')
        tick = round((self.num_frames / self.fps if time is None else time) * _CLOCK)
        self._last_tick = max(tick, self._last_tick + 1)  # times that stand still would be refused
        frame.pts, frame.time_base = self._last_tick, Fraction(1, _CLOCK)
        if self._sound is not None:
            self._sound.mux_until(self._last_tick / _CLOCK)
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
        self.num_frames += 1

    def _begin(self, width: int, height: int) -> None:
        if min(width, height) < 2:
            raise InputError(f'a video of {width} x {height} pixels cannot be written: both sides must be 2 or more')
        self._stream = self._container.add_stream('libx264', rate=Fraction(self.fps).limit_denominator(1001))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, 'yuv420p'
        self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, _CLOCK)
        self._stream.options = {'crf': '18', 'preset': 'veryfast'}
        if self._sound_from is not None:
            self._sound = _Sound.open(self._sound_from, self._container, self.warnings)
            if self._sound is not None:
                self._exit.callback(self._sound.close)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and self._stream is not None:
            for packet in self._stream.encode():
                self._container.mux(packet)
            if self._sound is not None:
                self._sound.mux_until((self._last_tick + _CLOCK / self.fps) / _CLOCK)
        self._exit.__exit__(kind, error, trace)


class _Sound:
    """The sound track of a video on its way into another one."""

    def __init__(self, source: Any, target: Any, warnings: List[str]) -> None:
        self._source, self._target, self._warnings = source, target, warnings
        self._in = source.streams.audio[0]
        self._copies = self._in.codec_context.name in _SOUND_IN_MP4
        self._out = target.add_stream_from_template(self._in) if self._copies else \
            target.add_stream('aac', rate=self._in.rate, layout='mono' if self._in.channels == 1 else 'stereo')
        video = source.streams.video[0] if source.streams.video else None
        self._begin = float(video.start_time * video.time_base) if video and video.start_time else 0.
        self._packets = self._read()
        self._next: Optional[Tuple[float, List[Any]]] = next(self._packets, None)

    @classmethod
    def open(cls, path: Union[str, os.PathLike], target: Any, warnings: List[str]) -> Optional['_Sound']:
        import av

        source = av.open(os.fspath(path))
        if not source.streams.audio:
            source.close()
            return None
        try:
            return cls(source, target, warnings)
        except (av.FFmpegError, ValueError) as error:
            source.close()
            warnings.append(f'The sound could not be carried over ({error}).')
            return None

    def mux_until(self, seconds: float) -> None:
        while self._next is not None and self._next[0] <= seconds:
            for packet in self._next[1]:
                self._target.mux(packet)
            self._next = next(self._packets, None)

    def _read(self) -> Iterator[Tuple[float, List[Any]]]:
        """Packets for the target, with their seconds since the first frame."""
        import av

        shift = round(self._begin / self._in.time_base)
        try:
            for packet in self._source.demux(self._in):
                if packet.dts is None or packet.pts is None:  # the end
                    continue
                time = float(packet.pts * self._in.time_base) - self._begin
                if time < 0:
                    continue
                if self._copies:
                    packet.stream = self._out
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    yield time, [packet]
                else:
                    for frame in packet.decode():
                        frame.pts = None if frame.pts is None else frame.pts - shift
                        yield time, list(self._out.encode(frame))
            if not self._copies:
                yield 0., list(self._out.encode())
        except av.FFmpegError as error:
            self._warnings.append(f'The sound breaks off ({error}).')

    def close(self) -> None:
        self._source.close()
