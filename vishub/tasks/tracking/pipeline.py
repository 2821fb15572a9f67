"""Tracking: a video and the target's box in its first frame in, its box in every frame out."""
import csv
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch import nn

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.models.bactrack import BACTrack
from vishub.tasks.base import Pipeline, Progress, Result
from vishub.tasks.clips import Clip, VideoInput, open_clip
from vishub.tasks.tracking import overlay
from vishub.tasks.tracking.collection import Template
from vishub.tasks.tracking.tracker import Step, Tracker
from vishub.tasks.video import VideoFrame, VideoWriter

__all__ = ['Thumbnail', 'TrackingPipeline', 'TrackingResult', 'create_tracker']

_MOST_TEMPLATES, _MOST_PICTURES = 64, 12  # kept for the eye, however long the video is
_PICTURE_SIDE = 320
_LOST = 0.5  # reliability below which a stretch counts as lost

Box = Union[Sequence[float], np.ndarray]


class Thumbnail(NamedTuple):
    """A template that joined the collection.

    Attributes:
        frame: It was cut from this frame.
        reliability: Of its box, 0 to 1.
        pixels: uint8 (h, w, 3).
        in_use: Whether it is still a member at the end.
    """
    frame: int
    reliability: float
    pixels: np.ndarray
    in_use: bool


@dataclass(frozen=True, eq=False)
class TrackingResult(Result):
    """Where the target is in each frame.

    Attributes:
        boxes: x, y, w, h in pixels, float64 (N, 4); the first is the given one.
        confidence: Probability of the chosen place in each frame, 0 to 1, (N,).
        reliability: Whether the box shows the target of the first frame, 0 to 1, (N,).
        num_templates: Members of the collection behind each frame, (N,).
        changed: Whether a frame changed the collection, bool (N,).
        times: Seconds of each frame from the beginning, as the video says, (N,); None if it does not.
        size: Width and height of the first frame.
        templates: Those that joined the collection, the last 64 at most.
        pictures: Some frames, small, with their numbers.
        model: Name of the model.
        template_update: `collection`, `latest` or `none`.
        latency_ms: Milliseconds a frame; reading the video, and the first frame, are not in it.
        num_params: Parameters of the model.
        frames: The video, for the annotated copy.
        source: Path or file name; None for values given directly.
        warnings: What went wrong on the way, one sentence each.
    """
    suffixes = ('.mp4', '.png', '.csv', '.json')

    boxes: np.ndarray = field(repr=False)
    confidence: np.ndarray = field(repr=False)
    reliability: np.ndarray = field(repr=False)
    num_templates: np.ndarray = field(repr=False)
    changed: np.ndarray = field(repr=False)
    times: Optional[np.ndarray] = field(repr=False)
    size: Tuple[int, int]
    templates: Tuple[Thumbnail, ...] = field(repr=False)
    pictures: Tuple[Tuple[int, np.ndarray], ...] = field(repr=False)
    model: str
    template_update: str
    latency_ms: float
    num_params: int
    frames: Clip = field(repr=False)
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def fps(self) -> float:
        """Frames that the tracker does a second."""
        return 1000 / self.latency_ms

    @property
    def lost_from(self) -> Optional[int]:
        """From which frame to the end the boxes are unreliable; None if the last one is reliable."""
        bad = self.reliability < _LOST
        if not bad[-1]:
            return None
        good = np.flatnonzero(~bad)
        return int(good[-1]) + 1 if len(good) else 0

    def to_dict(self) -> Dict[str, Any]:
        """All but pixels; times are rounded to 0.1 ms, boxes to 0.001 pixels."""
        rows = []
        for number in range(len(self)):
            x, y, w, h = (round(float(value), 3) for value in self.boxes[number])
            rows.append({
                'frame': number,
                'time': None if self.times is None else round(float(self.times[number]), 4),
                'x': x, 'y': y, 'w': w, 'h': h,
                'confidence': round(float(self.confidence[number]), 4),
                'reliability': round(float(self.reliability[number]), 4),
                'templates': int(self.num_templates[number]),
                'changed': bool(self.changed[number]),
            })
        return {
            'source': self.source,
            'model': self.model,
            'template_update': self.template_update,
            'width': self.size[0],
            'height': self.size[1],
            'num_frames': len(self),
            'lost_from': self.lost_from,
            'latency_ms': round(self.latency_ms, 3),
            'num_params': self.num_params,
            'templates': [
                {'frame': t.frame, 'reliability': round(t.reliability, 4), 'in_use': t.in_use} for t in self.templates],
            'frames': rows,
            'warnings': list(self.warnings),
        }

    def summary(self) -> Sequence[str]:
        lines = [
            f'{len(self)} frames, {self.latency_ms:.1f} ms each ({self.fps:.0f} a second); mean confidence '
            f'{self.confidence[1:].mean():.2f}, mean reliability {self.reliability[1:].mean():.2f}',
            f'{self.num_templates[-1]} templates at the end, the collection changed {int(self.changed.sum())} times']
        if self.lost_from is not None:
            lines.append(f'from frame {self.lost_from} on the target was not seen for certain: it may have left')
        return lines

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """Write the result whole or not at all.

        Args:
            path: `.mp4` for the video with boxes drawn in, at its own times and with its sound; `.csv` for a row a
                frame; `.txt` for a line x,y,w,h a frame, as the got10k toolkit has it; `.png` or `.jpg` for `plot()`;
                `.json` for `to_dict()`.

        Raises:
            InputError: If the path ends otherwise, or the video cannot be read again.
            MissingExtraError: If a video is wanted and PyAV or supervision is not installed.
            OSError: If the folder cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in ('.json', '.png', '.jpg', '.jpeg', '.webp'):
            return super().save(path)
        if suffix == '.mp4':
            self._write_video(path)
            return path
        if suffix not in ('.csv', '.txt'):
            raise InputError(
                f"cannot save a track as '{path}': give a name that ends in .mp4, .csv, .txt, .png, .jpg or .json")
        with atomic_path(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
            if suffix == '.txt':
                file.writelines(f'{",".join(f"{value:.3f}" for value in box)}\n' for box in self.boxes)
            else:
                rows = self.to_dict()['frames']
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        return path

    def _write_video(self, path: Path) -> None:
        import_extra('supervision', 'video')
        rate = 25. if self.times is None or len(self) < 2 else 1 / max(float(np.median(np.diff(self.times))), 1e-3)
        sound = self.frames.sound
        with VideoWriter(path, fps=rate, sound_from=sound) as writer:
            for number, frame in zip(range(len(self)), self.frames.read()):
                pixels = overlay.draw_box(
                    frame.pixels, self.boxes[number], float(self.confidence[number]), float(self.reliability[number]))
                if pixels.shape[1::-1] != self.size:  # a video has one size, whatever its source had
                    pixels = np.asarray(Image.fromarray(pixels).resize(self.size, Image.Resampling.BILINEAR))
                writer.write(pixels, None if self.times is None else float(self.times[number]))

    # -- drawing ------------------------------------------------------------------------------------------------------

    def plot(self) -> Image.Image:
        """Some frames with their boxes, the scores over time, and the templates."""
        name = f'{self.model}: {os.path.basename(self.source)}' if self.source else self.model
        facts = f'{self.num_params / 1e6:.1f} M parameters, {self.latency_ms:.1f} ms a frame'
        return overlay.page(
            name, facts, [overlay.stack_pictures(self._drawn()), self.plot_scores(), self.plot_templates()])

    def _drawn(self) -> List[Tuple[int, Image.Image]]:
        return [
            (number, overlay.thumbnail(pixels, self.boxes[number] * (pixels.shape[1] / self.size[0]),
                                       float(self.reliability[number])))
            for number, pixels in self.pictures]

    def plot_scores(self, width: int = 900, height: int = 260) -> Image.Image:
        """Confidence and reliability over the frames, with marks where the collection changed."""
        return overlay.score_chart(
            self.confidence, self.reliability, np.flatnonzero(self.changed), self.times, width, height)

    def plot_templates(self, width: int = 900) -> Image.Image:
        """The templates that joined the collection; those still in use are framed."""
        return overlay.template_sheet(
            [(t.frame, t.reliability, t.pixels, t.in_use) for t in self.templates], width)


class TrackingPipeline(Pipeline):
    """Follow a target through a video.

        pipe = TrackingPipeline('bactrack_tiny.scenes')
        result = pipe('drone.mp4', box=(310, 140, 42, 30))
        result.save('tracked.mp4')

    The networks are BACTrack-style, not a reproduction of the paper's. Calls share the network and nothing else.

    Args:
        model: See `Pipeline`. A module must be a `BACTrack`.
        device: See `Pipeline`.

    Raises:
        InputError: If the module is no tracking network; or as `Pipeline` says.
    """

    task = 'tracking'
    default_model = 'bactrack_tiny.scenes'
    takes_pictures = False

    def __init__(
            self,
            model: Union[str, nn.Module, None] = None,
            device: Union[str, torch.device, None] = None,
    ):
        super().__init__(model, device)
        if not isinstance(self.model, BACTrack):
            raise InputError(
                f"'{self.name}' tracks nothing: give a BACTrack, such as {self.default_model.partition('.')[0]}")

    def tracker(self, **options: Any) -> Tracker:
        """A tracker to be fed frame by frame; options as of `Tracker` and `TrackerConstants`."""
        return Tracker(self.model, self.device, **options)  # type: ignore[arg-type]

    def __call__(
            self,
            video: VideoInput,
            box: Optional[Box] = None,
            template_update: str = 'collection',
            interval: Optional[int] = None,
            max_templates: Optional[int] = None,
            min_size: Optional[float] = None,
            limit: Optional[int] = None,
            progress: Optional[Progress] = None,
    ) -> TrackingResult:
        """Track through one video.

        Args:
            video: See `open_clip`. A list is one video, frame by frame.
            box: The target in the first frame: x, y, w, h in pixels, top left first.
            template_update: `collection`, `latest` (one later template), or `none` (the first one alone).
            interval: Frames between updates of the collection. None, here and below, is what the weights carry (see
                `TrackerConstants`).
            max_templates: Templates at most.
            min_size: Least width and height of a box in pixels.
            limit: Stop after so many frames.
            progress: Called with (frames done, frames in all); the latter is 0 where the video does not tell.

        Raises:
            InputError: If the video cannot be read or has one frame only, or the box cannot be used.
        """
        if box is None:
            raise InputError('tracking needs the target in the first frame: give box=x,y,w,h in pixels')
        if limit is not None and limit < 2:
            raise InputError(f'limit is {limit}: give 2 or more')
        tracker = self.tracker(
            template_update=template_update, interval=interval, max_templates=max_templates, min_size=min_size)
        frames = open_clip(video)
        log = _Log(tracker)
        total = min(frames.num_frames, limit) if limit and frames.num_frames else limit or frames.num_frames
        stream = frames.read()
        try:
            for frame in _until_damage(stream, log):
                log.add(frame, box)
                if progress is not None:
                    progress(len(log.steps), max(total, len(log.steps)) if total else 0)
                if limit is not None and len(log.steps) == limit:
                    break
        finally:
            close = getattr(stream, 'close', None)
            if close is not None:
                close()
        if len(log.steps) < 2:
            count = 'one frame' if log.steps else 'no frames'
            raise InputError(f'{frames.name} has {count}: there is nothing to follow')
        return log.result(frames, self.name, self.num_params, template_update)


def create_tracker(
        model: Union[str, nn.Module, None] = None,
        device: Union[str, torch.device, None] = None,
        **options: Any,
) -> Tracker:
    """A tracker to be fed frame by frame.

        tracker = create_tracker('bactrack_tiny.scenes', interval=10)

    Args:
        model: Name of a model with weights, a module, or None for the task's default; see `Pipeline`.
        device: See `Pipeline`.
        **options: Of `Tracker` and `TrackerConstants`.
    """
    return TrackingPipeline(model, device).tracker(**options)


def _until_damage(frames: Iterator[VideoFrame], log: '_Log') -> Iterator[VideoFrame]:
    """The frames; a video that breaks off behind its second frame ends with a warning."""
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except InputError as error:
            if len(log.steps) < 2:
                raise
            log.warnings.append(f'The video is damaged behind frame {len(log.steps)}; it was tracked up to there '
                                f'({error}).')
            return
        yield frame


class _Log:
    """What a run leaves behind: numbers of every frame, pictures of a few."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.steps: List[Step] = []
        self.times: List[Optional[float]] = []
        self.warnings: List[str] = []
        self.size = (0, 0)
        self._sizes: set = set()
        self._seconds = 0.
        self._templates: List[Template] = []
        self._pictures: List[Tuple[int, np.ndarray]] = []
        self._every = 1

    def add(self, frame: VideoFrame, box: Box) -> None:
        begin = time.perf_counter()
        if not self.steps:
            self.tracker.init(frame.pixels, box)
            self.size = (frame.pixels.shape[1], frame.pixels.shape[0])
        else:
            self.tracker.update(frame.pixels)
            self._seconds += time.perf_counter() - begin
        step = self.tracker.last
        assert step is not None
        self._sizes.add(frame.pixels.shape[:2])
        if not self.steps or step.changed:
            known = {id(template) for template in self._templates}
            self._templates += [t for t in self.tracker.collection.templates if id(t) not in known]
            del self._templates[1:-_MOST_TEMPLATES + 1]
        self._keep_picture(frame.pixels)
        self.steps.append(step)
        self.times.append(frame.time)

    def _keep_picture(self, pixels: np.ndarray) -> None:
        number = len(self.steps)
        if number % self._every == 0:
            small = Image.fromarray(pixels)
            small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
            self._pictures.append((number, np.asarray(small)))
            if len(self._pictures) > _MOST_PICTURES:
                self._every *= 2
                self._pictures = self._pictures[::2]

    def result(self, frames: Clip, model: str, num_params: int, template_update: str) -> TrackingResult:
        times = None if any(one is None for one in self.times) else np.array(self.times, np.float64)
        if times is not None and (np.diff(times) <= 0).any():
            times = None
            self.warnings.append('The times of the frames do not rise, so they were left out.')
        if len(self._sizes) > 1:
            self.warnings.append(f'The frames have {len(self._sizes)} different sizes; boxes are in pixels of each.')
        used = {id(template) for template in self.tracker.collection.templates}
        return TrackingResult(
            boxes=np.stack([step.box for step in self.steps]),
            confidence=np.array([step.confidence for step in self.steps]),
            reliability=np.array([step.reliability for step in self.steps]),
            num_templates=np.array([step.num_templates for step in self.steps]),
            changed=np.array([step.changed for step in self.steps]),
            times=times,
            size=self.size,
            templates=tuple(
                Thumbnail(t.frame, t.reliability, t.pixels, id(t) in used) for t in self._templates),
            pictures=tuple(self._pictures),
            model=model,
            template_update=template_update,
            latency_ms=1000 * self._seconds / (len(self.steps) - 1),
            num_params=num_params,
            frames=frames,
            source=frames.source,
            warnings=tuple(self.warnings),
        )
