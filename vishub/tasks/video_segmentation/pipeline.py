"""Segmentation of ultrasound clips: a clip in, a mask for every frame out. Research use only."""
import itertools
import time
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vishub.errors import InputError
from vishub.tasks.base import Pipeline, Progress, pretrained_cfg_of
from vishub.tasks.clips import VideoInput, is_frames, open_clip
from vishub.tasks.video_segmentation.result import VideoSegmentationResult

__all__ = ['VideoSegmentationPipeline']

MAX_BYTES = 1 << 30  # of the masks kept of one clip, eight pixels a byte
_STILLS = 24


class VideoSegmentationPipeline(Pipeline):
    """Say where a lesion is in every frame of an ultrasound clip. Research use only, not for diagnosis.

        pipe = VideoSegmentationPipeline('astr_tiny.phantoms')
        result = pipe('clip.mp4')
        result.areas           # of the lesion in each frame
        result.save('overlay.mp4')

    Frames are scaled to the model's size, and go through its backbone once each; those before a frame are its context.
    Memory is that of a few frames and of all masks, eight pixels a byte.

    Args:
        model: See `Pipeline`. A module needs `stream` and `clip_size`, as ASTR has them.
        device: See `Pipeline`.

    Raises:
        InputError: If the module segments no clips; or as `Pipeline` says.

    Attributes:
        clip_size: Frames T that the model looks at: the one to segment, and T - 1 before it.
        size: Height and width that frames are scaled to.
    """

    task = 'video_segmentation'
    default_model = 'astr_tiny.phantoms'
    takes_pictures = False

    def __init__(
            self,
            model: Union[str, nn.Module, None] = None,
            device: Union[str, torch.device, None] = None,
    ):
        super().__init__(model, device)
        module: Any = self.model
        if not all(hasattr(module, name) for name in ('stream', 'clip_size')):
            raise InputError(
                f"'{self.name}' segments no clips: give a model with stream and clip_size, such as "
                f'{self.default_model.partition(".")[0]}')
        if isinstance(getattr(module, 'head', None), nn.Identity):
            raise InputError(f"'{self.name}' has lost its head (reset_classifier(0)): it gives features, no masks")
        if module.num_classes != 1:
            raise InputError(f"'{self.name}' gives {module.num_classes} maps a frame, this task takes one, of lesions")
        cfg = pretrained_cfg_of(self.model)
        self.clip_size: int = module.clip_size
        self.size: Tuple[int, int] = tuple(cfg.get('input_size') or (3, 352, 352))[1:]
        self.mean, self.std = (
            torch.tensor(tuple(cfg.get(key) or (default,)), dtype=torch.float32).view(-1, 1, 1).to(self.device)
            for key, default in (('mean', 0.5), ('std', 0.5)))

    def __call__(
            self,
            video: Union[VideoInput, Sequence[VideoInput]],
            start: int = 0,
            count: Optional[int] = None,
            stride: int = 1,
            chunk: Optional[int] = None,
            progress: Optional[Progress] = None,
    ) -> Union[VideoSegmentationResult, List[VideoSegmentationResult]]:
        """Segment one clip, or each of a list.

        Args:
            video: A clip as `open_clip` takes it, or a list of clips; a list gives a list of results in the same
                order. A list of pictures is one clip.
            start: First frame to segment, from 0.
            count: How many frames at most; all by default.
            stride: Take every so manieth frame; the context is then taken with the same stride.
            chunk: Frames that go through the backbone at once: 4 on the CPU, 16 elsewhere by default.
            progress: Called with (frames done, frames in all) of a clip; the latter 0 where the clip does not tell.

        Raises:
            InputError: If a clip cannot be read (in a list: nothing is returned for the others either), or an option
                is out of range.
        """
        if start < 0 or stride < 1 or (count is not None and count < 1) or (chunk is not None and chunk < 1):
            raise InputError(
                f'start is {start}, count {count}, stride {stride}, chunk {chunk}: give start 0 or more, the others 1 '
                'or more')
        chunk = chunk or (4 if self.device.type == 'cpu' else 16)
        if not isinstance(video, (list, tuple)) or is_frames(video):
            return self._segment(video, start, count, stride, chunk, progress)
        results = []
        for number, one in enumerate(video, 1):
            try:
                results.append(self._segment(one, start, count, stride, chunk, progress))
            except InputError as error:
                raise InputError(f'clip {number} of {len(video)}: {error}') from error.__cause__
        return results

    def _segment(
            self, video: Any, start: int, count: Optional[int], stride: int, chunk: int, progress: Optional[Progress],
    ) -> VideoSegmentationResult:
        clip = open_clip(video)
        warnings = list(clip.warnings)
        total = max(0, -(-(clip.num_frames - start) // stride))
        total = min(total, count or total)
        times: List[Optional[float]] = []
        stills: List[Tuple[int, np.ndarray]] = []
        step, seen, decoding = 1, 0, 0.

        def frames() -> Iterator[np.ndarray]:
            nonlocal step, seen, decoding
            end = None if count is None else start + count * stride
            source = clip.frames(warnings)
            for place in itertools.count():
                begin = time.perf_counter()
                frame = next(source, None)
                decoding += time.perf_counter() - begin
                if frame is None:
                    return
                seen = place + 1
                if place == end:
                    return
                if place < start or (place - start) % stride:
                    continue
                if len(times) % step == 0:
                    stills.append((len(times), frame.pixels))
                    if len(stills) > _STILLS:  # the clip is longer than was known: every second one stays
                        stills[:] = stills[::2]
                        step *= 2
                times.append(frame.time)
                yield frame.pixels

        packed: List[np.ndarray] = []
        spent, size = 0., 0
        if progress is not None:
            progress(0, total)
        logits = self.logits(frames(), chunk)
        while True:
            begin = time.perf_counter()
            values = next(logits, None)
            spent += time.perf_counter() - begin
            if values is None:
                break
            for one in values:
                packed.append(np.packbits(one > 0, axis=1))
                size += packed[-1].nbytes
            if size > MAX_BYTES:
                raise InputError(
                    f'the masks of {clip.name} need more than {MAX_BYTES >> 20:,} MB: give count={len(packed) - 1}')
            if progress is not None:
                progress(len(packed), max(total, len(packed)) if total else 0)
        if not packed:
            raise InputError(f'{clip.name} has {seen} frame{"s" * (seen > 1)}, none from number {start} on: give '
                             'another start')
        if len(packed) == 1:
            warnings.append('The clip has one frame, which stands for its own context.')
        known = None if any(moment is None for moment in times) else np.array(times, np.float64)
        if known is not None and len(known) > 1 and not (np.diff(known) > 0).all():
            known = None
            warnings.append('The times of the frames do not rise, so they were left out.')
        height, width = stills[0][1].shape[:2]
        return VideoSegmentationResult(
            packed=np.stack(packed), width=width, height=height, times=known, spacing=clip.spacing, first=start,
            stride=stride, stills=tuple(stills), clip=clip, model=self.name,
            latency_ms=1000 * (spent - decoding) / len(packed), num_params=self.num_params, source=clip.source,
            warnings=tuple(dict.fromkeys(warnings)))

    def logits(self, frames: Iterable[np.ndarray], chunk: int = 1) -> Iterator[np.ndarray]:
        """Logits of each frame at its own size; above 0 is lesion.

        Args:
            frames: uint8 RGB (H, W, 3), one after the other, of one size.
            chunk: Frames that go through the backbone at once.

        Yields:
            float32 (m, H, W) of the next m frames, m >= 1.

        Raises:
            InputError: If the weights give values that are not finite.
        """
        model: Any = self.model
        size: Tuple[int, int] = (0, 0)

        def chunks() -> Iterator[torch.Tensor]:
            nonlocal size
            source = iter(frames)
            while batch := list(itertools.islice(source, chunk)):
                size = batch[0].shape[:2]
                yield self.prepared(batch)

        stream = model.stream(chunks())
        while True:
            with torch.inference_mode():
                values = next(stream, None)
                if values is None:
                    return
                values = F.interpolate(values.float(), size=size, mode='bilinear', align_corners=False)[:, 0].cpu()
            if not torch.isfinite(values).all():
                raise InputError(f"'{self.name}' gave values that are not finite: its weights are damaged")
            yield values.numpy()

    def prepared(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 RGB frames (H, W, 3) -> the model's input (n, 3, h, w) on its device: scaled and normalised."""
        height, width = self.size
        scaled = np.stack([
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)) for frame in frames])
        x = torch.from_numpy(scaled).to(self.device).permute(0, 3, 1, 2).float() / 255
        return (x - self.mean) / self.std
