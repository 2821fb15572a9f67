"""Video prediction: a clip in, the frames that follow out, beside the true ones where there are any."""
import io
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.tasks import drawing
from vishub.tasks.base import Pipeline, Progress, Result, pretrained_cfg_of
from vishub.tasks.clips import VideoInput, is_frames
from vishub.tasks.video import VideoWriter
from vishub.tasks.video_prediction.clips import MAX_BYTES, Clip, read_clip

__all__ = ['VideoPredictionPipeline', 'VideoPredictionResult', 'frame_errors']

_TRUE, _PREDICTED, _COPIED = (24, 128, 92), drawing.ACCENT, (150, 154, 166)  # colours of the three lines and borders


@dataclass(frozen=True, eq=False)
class VideoPredictionResult(Result):
    """What a model says comes next.

    Attributes:
        given: The frames it was given, float32 (T, C, H, W): pictures from 0 to 1, measurements in their own unit.
        predicted: The frames that it says follow, float32 (n, C, H, W); values are not clipped.
        truth: The frames that do follow, float32 (m, C, H, W) with m up to n; None if the clip has none.
        times: Seconds of all given and predicted frames from the beginning of the video, (T + n,); those beyond
            the clip go on at its median pace. None if the clip has no times.
        first: Which frame of the clip the first given one is, from 0.
        model: Name of the model.
        latency_ms: Milliseconds for all predicted frames; reading the clip is not in it.
        num_params: Parameters of the model.
        picture: Whether values are pictures from 0 to 1.
        source: Path or file name; None for values given directly.
        warnings: What was guessed or left out, one sentence each.
    """
    suffixes = ('.gif', '.png', '.npy', '.json')

    given: np.ndarray = field(repr=False)
    predicted: np.ndarray = field(repr=False)
    truth: Optional[np.ndarray] = field(repr=False)
    times: Optional[np.ndarray] = field(repr=False)
    first: int
    model: str
    latency_ms: float
    num_params: int
    picture: bool = True
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()

    @property
    def errors(self) -> Optional[Dict[str, List[float]]]:
        """Squared error of each future frame that has a truth, summed over its values (the field's MSE).

        `predicted` is the model's, `copied` that of the last given frame, which any model should beat.
        """
        if self.truth is None:
            return None
        predicted = self.predicted[:len(self.truth)]
        return {
            'predicted': frame_errors(predicted, self.truth),
            'copied': frame_errors(np.broadcast_to(self.given[-1:], self.truth.shape), self.truth),
        }

    def to_dict(self) -> Dict[str, Any]:
        """All but the pixels."""
        _, channels, height, width = self.given.shape
        return {
            'source': self.source,
            'model': self.model,
            'width': width,
            'height': height,
            'channels': channels,
            'first': self.first,
            'num_given': len(self.given),
            'num_predicted': len(self.predicted),
            'times': None if self.times is None else [round(float(t), 4) for t in self.times],
            'errors': self.errors,
            'latency_ms': round(self.latency_ms, 3),
            'num_params': self.num_params,
            'warnings': list(self.warnings),
        }

    def summary(self) -> Sequence[str]:
        lines = [f'{len(self.predicted)} frames predicted from {len(self.given)} in {self.latency_ms:.0f} ms']
        if self.errors is not None:
            own, copied = (float(np.mean(self.errors[key])) for key in ('predicted', 'copied'))
            lines.append(
                f'squared error a frame {own:.4g}; of the last given frame, copied, {copied:.4g} '
                f'(over the {len(self.errors["predicted"])} that have a truth)')
        return lines

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """Write the result whole or not at all.

        Args:
            path: `.gif`, `.webp` or `.mp4` for the animation (see `animation`); `.npy` for the predicted frames,
                float32 (n, C, H, W); `.png` or `.jpg` for `plot()`; `.json` for `to_dict()`.

        Raises:
            InputError: If the path ends otherwise.
            MissingExtraError: If an .mp4 is wanted and PyAV is not installed.
            OSError: If the folder cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in ('.json', '.png', '.jpg', '.jpeg'):
            return super().save(path)
        if suffix not in ('.gif', '.webp', '.mp4', '.npy'):
            raise InputError(
                f"cannot save a prediction as '{path}': give a name that ends in .gif, .webp, .mp4, .npy, .png, .jpg "
                'or .json')
        if suffix == '.mp4':
            with VideoWriter(path, fps=1000 / self.frame_ms) as writer:
                for picture in self.animation():
                    writer.write(np.asarray(picture))
            return path
        with atomic_path(path) as temporary:
            if suffix == '.npy':
                with open(temporary, 'wb') as file:
                    np.save(file, self.predicted)
            else:
                temporary.write_bytes(encode_animation(self.animation(), self.frame_ms, suffix[1:]))
        return path

    @property
    def frame_ms(self) -> int:
        """Milliseconds for which a frame is shown: its own pace, but not faster than the eye; 200 where unknown."""
        if self.times is None or len(self.times) < 2:
            return 200
        return int(np.clip(round(1000 * float(np.median(np.diff(self.times)))), 40, 1000))

    # -- drawing ------------------------------------------------------------------------------------------------------

    def pixels(self, frames: np.ndarray) -> np.ndarray:
        """(n, C, H, W) -> uint8 (n, H, W, 3) to look at.

        Pictures are clipped to [0, 1]. Measurements are coloured, the first channel from the lowest to the highest
        value of given and true frames; so are pictures of other than one or three channels.
        """
        channels = frames.shape[1]
        if self.picture and channels in (1, 3):
            values = np.round(255 * frames.clip(0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)
            return np.repeat(values, 3, axis=3) if channels == 1 else values
        known = self.given if self.truth is None else np.concatenate([self.given, self.truth])
        low, high = float(known[:, 0].min()), float(known[:, 0].max())
        return drawing.heat_colours(((frames[:, 0] - low) / max(high - low, 1e-12)).clip(0, 1))

    def animation(self, side: int = 256) -> List[Image.Image]:
        """Truth and prediction side by side, one picture a frame, given frames first.

        Args:
            side: Pixels that the longer side of a panel is scaled to.
        """
        given, future = self.pixels(self.given), self.pixels(self.predicted)
        truth = None if self.truth is None else self.pixels(self.truth)
        total = len(given) + len(future)
        pictures = []
        for number in range(total):
            ahead = number - len(given) + 1
            if ahead <= 0:
                panels = [('Given', given[number], drawing.MUTED)] * (1 if truth is None else 2)
            else:
                panels = [('Predicted', future[ahead - 1], _PREDICTED)]
                if truth is not None:
                    true = truth[ahead - 1] if ahead <= len(truth) else None
                    panels.insert(0, ('True' if true is not None else 'Not known', true, _TRUE))
            pictures.append(self._panels(panels, number, total, side))
        return pictures

    def _panels(self, panels: Sequence[Tuple[str, Any, Any]], number: int, total: int, side: int) -> Image.Image:
        height, width = self.given.shape[2:]
        scale = side / max(height, width)
        wide, high = round(width * scale), round(height * scale)
        gap, header, footer = 16, 30, 30
        canvas = Image.new(
            'RGB', (len(panels) * (wide + gap) + gap, header + high + footer), drawing.PAPER)
        draw = ImageDraw.Draw(canvas)
        typeface = drawing.font(16)
        for place, (title, pixels, colour) in enumerate(panels):
            left = gap + place * (wide + gap)
            draw.text((left, 6), title, fill=colour, font=typeface)
            if pixels is None:
                draw.rectangle((left, header, left + wide - 1, header + high - 1), fill=(240, 241, 244))
            else:
                canvas.paste(_enlarged(pixels, wide, high), (left, header))
            draw.rectangle((left - 2, header - 2, left + wide + 1, header + high + 1), outline=colour, width=2)
        ahead = number - len(self.given) + 1
        text = f'frame {number + 1} of {total}' + (f', {ahead} ahead' if ahead > 0 else '')
        if self.times is not None:
            text += f', {self.times[number]:.2f} s'
        draw.text((gap, header + high + 7), drawing.elide(text, drawing.font(14), canvas.width - 2 * gap),
                  fill=drawing.MUTED, font=drawing.font(14))
        return canvas

    def plot(self) -> Image.Image:
        """Given, true and predicted frames as strips, and beneath them the error of each future frame."""
        strips = self.plot_frames()
        margin, header = 32, 72
        chart = 0 if self.errors is None else 252
        canvas = Image.new('RGB', (strips.width + 2 * margin, header + strips.height + chart + margin), drawing.PAPER)
        draw = ImageDraw.Draw(canvas)
        facts = f'{self.num_params / 1e6:.1f} M parameters, {self.latency_ms:.0f} ms'
        left = canvas.width - margin - drawing.font(16).getlength(facts)
        draw.text((left, 32), facts, fill=drawing.MUTED, font=drawing.font(16))
        name = f'{self.model}: {os.path.basename(self.source)}' if self.source else self.model
        draw.text((margin, 26), drawing.elide(name, drawing.font(22), left - 2 * margin), fill=drawing.INK,
                  font=drawing.font(22))
        canvas.paste(strips, (margin, header))
        if self.errors is not None:
            bottom = header + strips.height
            self._draw_errors(draw, self.errors, (margin, bottom + 24, canvas.width - margin, bottom + chart))
        return canvas

    def plot_frames(self) -> Image.Image:
        """Given, true and predicted frames as strips, at most twelve of each, evenly spread."""
        shown = _evenly(len(self.predicted))
        rows: List[Tuple[str, np.ndarray, Any]] = [
            ('Given', self.pixels(self.given[_evenly(len(self.given))]), drawing.MUTED)]
        if self.truth is not None:
            rows.append(('True', self.pixels(self.truth[[n for n in shown if n < len(self.truth)]]), _TRUE))
        rows.append(('Predicted', self.pixels(self.predicted[shown]), _PREDICTED))
        height, width = self.given.shape[2:]
        label, gap = 110, 6
        columns = max(len(pixels) for _, pixels, _ in rows)
        wide = max(24, min(104, (1240 - label) // columns - gap))
        high = round(wide * height / width)
        canvas = Image.new(
            'RGB', (max(label + columns * (wide + gap) - gap, 576), len(rows) * (high + 14) - 14), drawing.PAPER)
        draw = ImageDraw.Draw(canvas)
        for row, (title, pixels, colour) in enumerate(rows):
            top = row * (high + 14)
            draw.text((0, top + high // 2 - 10), title, fill=colour, font=drawing.font(18))
            for place, frame in enumerate(pixels):
                canvas.paste(_enlarged(frame, wide, high), (label + place * (wide + gap), top))
        return canvas

    def plot_errors(self, width: int = 640, height: int = 300) -> Optional[Image.Image]:
        """The chart of errors over the horizon alone, in pixels; None without a truth."""
        if self.errors is None:
            return None
        canvas = Image.new('RGB', (width, height), drawing.PAPER)
        self._draw_errors(ImageDraw.Draw(canvas), self.errors, (16, 12, width - 16, height - 8))
        return canvas

    @staticmethod
    def _draw_errors(
            draw: ImageDraw.ImageDraw, errors: Dict[str, List[float]], box: Tuple[int, int, int, int]) -> None:
        left, top, right, bottom = box
        small = drawing.font(14)
        draw.text((left, top), 'Squared error of each future frame', fill=drawing.INK, font=drawing.font(16))
        peak = max(max(values) for values in errors.values()) or 1.
        plot_left, plot_top, plot_bottom = left + 70, top + 34, bottom - 34
        plot_right = right - 150
        count = len(errors['predicted'])

        def place(number: int, value: float) -> Tuple[float, float]:
            x = plot_left + (plot_right - plot_left) * (number / (count - 1) if count > 1 else 0.5)
            return x, plot_bottom - (plot_bottom - plot_top) * value / peak

        for share in (0., 0.5, 1.):
            y = plot_bottom - (plot_bottom - plot_top) * share
            draw.line((plot_left, y, plot_right, y), fill=(226, 229, 236))
            text = f'{peak * share:.3g}'
            draw.text((plot_left - 8 - small.getlength(text), y - 8), text, fill=drawing.MUTED, font=small)
        every = max(1, -(-count // 12))
        for number in range(0, count, every):
            text = str(number + 1)
            draw.text((place(number, 0)[0] - small.getlength(text) / 2, plot_bottom + 6), text, fill=drawing.MUTED,
                      font=small)
        draw.text((plot_right + 14, plot_bottom + 6), 'frames ahead', fill=drawing.MUTED, font=small)
        lines = (('copied', 'last frame copied', _COPIED), ('predicted', 'predicted', _PREDICTED))
        ends: List[List[Any]] = []
        for key, title, colour in lines:
            points = [place(number, value) for number, value in enumerate(errors[key])]
            if count > 1:
                draw.line(points, fill=colour, width=3, joint='curve')
            for x, y in points:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
            ends.append([points[-1][1], title, colour])
        if abs(ends[0][0] - ends[1][0]) < 18:  # the labels would lie on each other
            upper, lower = sorted(ends, key=lambda end: end[0])
            middle = (upper[0] + lower[0]) / 2
            upper[0], lower[0] = middle - 9, middle + 9
        for y, title, colour in ends:
            draw.text((plot_right + 14, y - 9), title, fill=colour, font=small)


class VideoPredictionPipeline(Pipeline):
    """Say what comes next in a clip.

        pipe = VideoPredictionPipeline('predformer_tiny.moving_mnist')
        result = pipe('clip.gif', horizon=24)
        result.save('future.gif')

    Frames are cropped to the model's shape and scaled to its size. As many as it takes are given to it, and those of
    the clip that follow are kept as the truth.

    Args:
        model: See `Pipeline`. A module needs `num_frames`, `in_chans` and `img_size`, as PredFormer has them.
        device: See `Pipeline`.

    Raises:
        InputError: If the module is no video predictor; or as `Pipeline` says.

    Attributes:
        num_frames: Frames T that the model takes, and gives at a time.
        frame: C, H, W of a frame.
        picture: Whether the model was trained on pictures from 0 to 1; if not, it takes measurements.
    """

    task = 'video_prediction'
    default_model = 'predformer_tiny.moving_mnist'
    takes_pictures = False

    def __init__(
            self,
            model: Union[str, nn.Module, None] = None,
            device: Union[str, torch.device, None] = None,
    ):
        super().__init__(model, device)
        module: Any = self.model
        if not all(hasattr(module, name) for name in ('num_frames', 'in_chans', 'img_size')):
            raise InputError(
                f"'{self.name}' predicts no frames: give a model with num_frames, in_chans and img_size, such as "
                f'{self.default_model.partition(".")[0]}')
        if isinstance(getattr(module, 'head', None), nn.Identity):
            raise InputError(f"'{self.name}' has lost its head (reset_classifier(0)): it gives features, no frames")
        self.num_frames: int = module.num_frames
        self.frame: Tuple[int, int, int] = (module.in_chans, *module.img_size)
        cfg = pretrained_cfg_of(self.model)
        self.mean, self.std = (
            torch.tensor(tuple(cfg.get(key) or (default,)), dtype=torch.float32).view(-1, 1, 1).to(self.device)
            for key, default in (('mean', 0.), ('std', 1.)))
        self.picture = bool((self.mean == 0).all() and (self.std == 1).all())

    def __call__(
            self,
            video: Union[VideoInput, Sequence[VideoInput]],
            horizon: Optional[int] = None,
            start: int = 0,
            stride: int = 1,
            batch_size: int = 8,
            progress: Optional[Progress] = None,
    ) -> Union[VideoPredictionResult, List[VideoPredictionResult]]:
        """Predict what follows in one clip, or in each of a list.

        Args:
            video: A clip as `read_clip` takes it, or a list of clips; a list gives a list of results in the same
                order. A list of pictures is one clip.
            horizon: How many future frames; as many as the model gives at a time by default. Beyond that the model
                is fed its own predictions.
            start: Frame of the clip that is the first given one; negative numbers count from the end, so that minus
                the number of given frames asks what follows the whole clip.
            stride: Take every so manieth frame, for videos that are faster than the model's data.
            batch_size: Clips run at once when a list is given.
            progress: Called with (frames done, frames in all), summed over the clips.

        Raises:
            InputError: If a clip cannot be read or is too short (in a list: nothing is returned for the others
                either), or an option is out of range.
        """
        horizon = self.num_frames if horizon is None else horizon
        if horizon < 1:
            raise InputError(f'horizon is {horizon}: give 1 or more')
        most = MAX_BYTES // (4 * int(np.prod(self.frame)))
        if horizon > most:
            raise InputError(f'horizon is {horizon:,}: give at most {most:,}, for all predicted frames are kept')
        several = isinstance(video, (list, tuple)) and not is_frames(video)
        clips: Sequence[Any] = video if several else [video]  # type: ignore[assignment]
        if batch_size < 1:
            raise InputError(f'batch_size is {batch_size}: give 1 or more')
        if several and not clips:
            return []
        results: List[VideoPredictionResult] = []
        total = len(clips) * horizon
        if progress is not None:
            progress(0, total)
        for begin in range(0, len(clips), batch_size):
            read = []
            for number, clip in enumerate(clips[begin:begin + batch_size], begin + 1):
                try:
                    read.append(self._read(clip, horizon, start, stride))
                except InputError as error:
                    if not several:
                        raise
                    raise InputError(f'clip {number} of {len(clips)}: {error}') from error.__cause__

            def advance(frames: int, begin: int = begin, batch: int = len(read)) -> None:
                if progress is not None:
                    progress(begin * horizon + batch * frames, total)

            results += self._predict(read, horizon, advance)
        return results if several else results[0]

    def _read(self, video: Any, horizon: int, start: int, stride: int) -> Clip:
        clip = read_clip(
            video, self.frame, self.num_frames + horizon, start=start, stride=stride, picture=self.picture)
        found, needed = len(clip.frames), self.num_frames
        if found < needed:
            name = f"'{clip.source}'" if clip.source else 'the clip'
            behind = f' from frame {clip.first} on' if clip.first else ''
            every = f', every {stride}th taken' if stride > 1 else ''
            still = ' a still picture does not tell what moves;' if found == 1 else ''
            raise InputError(
                f'{name} has {found} frame{"s" * (found > 1)}{behind}{every};{still} the model needs {needed}')
        return clip

    def _predict(self, clips: List[Clip], horizon: int, advance: Any) -> List[VideoPredictionResult]:
        given = torch.from_numpy(np.stack([clip.frames[:self.num_frames] for clip in clips]))
        begin = time.perf_counter()
        predicted = self.rollout(given, horizon, advance).numpy()
        latency_ms = (time.perf_counter() - begin) * 1000 / len(clips)
        if not np.isfinite(predicted).all():
            raise InputError(f"'{self.name}' gave values that are not finite: its weights are damaged")
        return [
            VideoPredictionResult(
                given=clip.frames[:self.num_frames],
                predicted=frames,
                truth=clip.frames[self.num_frames:] if len(clip.frames) > self.num_frames else None,
                times=_times(clip.times, self.num_frames + horizon),
                first=clip.first,
                model=self.name,
                latency_ms=latency_ms,
                num_params=self.num_params,
                picture=self.picture,
                source=clip.source,
                warnings=clip.warnings,
            )
            for clip, frames in zip(clips, predicted)
        ]

    @torch.inference_mode()
    def rollout(self, given: torch.Tensor, horizon: int, advance: Any = None) -> torch.Tensor:
        """The next `horizon` frames; predictions are fed back as they are, without clipping.

        Args:
            given: (B, T, C, H, W) float32 in the data's own scale.
            horizon: How many, at least 1.
            advance: Called with the number of frames done after each pass.

        Returns:
            (B, horizon, C, H, W) float32 on the CPU.
        """
        x = (given.to(self.device) - self.mean) / self.std
        done: List[torch.Tensor] = []
        for first in range(0, horizon, self.num_frames):
            x = self.model(x)
            done.append((x.float() * self.std + self.mean)[:, :horizon - first].cpu())
            if advance is not None:
                advance(min(first + self.num_frames, horizon))
        return torch.cat(done, dim=1)


def frame_errors(predicted: np.ndarray, true: np.ndarray) -> List[float]:
    """Squared error of each frame, summed over channels and pixels: (n, C, H, W) twice -> n numbers."""
    return [float(value) for value in np.square(predicted.astype(np.float64) - true).sum((1, 2, 3))]


def encode_animation(pictures: Sequence[Image.Image], frame_ms: int, kind: str) -> bytes:
    """RGB pictures as an endless `gif` or `webp`."""
    buffer = io.BytesIO()
    first, *rest = pictures
    if kind == 'gif':
        # One palette for all frames, or colours would flicker.
        some = [pictures[place] for place in _evenly(len(pictures), 6)]
        sheet = Image.new('RGB', (first.width, first.height * len(some)))
        for number, picture in enumerate(some):
            sheet.paste(picture, (0, number * first.height))
        palette = sheet.quantize(255, method=Image.Quantize.MEDIANCUT)
        first, *rest = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    first.save(buffer, kind.upper(), save_all=True, append_images=rest, duration=frame_ms, loop=0)
    return buffer.getvalue()


def _times(times: Optional[np.ndarray], count: int) -> Optional[np.ndarray]:
    """Times of `count` frames; those that the clip has not go on at its median pace."""
    if times is None or len(times) < 2:
        return None
    missing = count - len(times)
    if missing <= 0:
        return times[:count]
    pace = float(np.median(np.diff(times)))
    return np.concatenate([times, times[-1] + pace * np.arange(1, missing + 1)])


def _evenly(count: int, most: int = 12) -> List[int]:
    """At most `most` of `count` places, evenly spread, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _enlarged(pixels: np.ndarray, width: int, height: int) -> Image.Image:
    """Small frames keep their pixels visible, large ones are scaled smoothly."""
    image = Image.fromarray(pixels)
    method = Image.Resampling.NEAREST if image.width <= width else Image.Resampling.LANCZOS
    return image.resize((width, height), method)
