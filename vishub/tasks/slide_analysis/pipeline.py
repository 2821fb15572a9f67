"""Slide analysis: a whole-slide image in, its class in each of the tasks learnt, and where on the slide it shows.

Research use only: nothing here is a diagnosis.
"""
import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.tasks import drawing
from vishub.tasks.base import Pipeline, Progress, Result, pretrained_cfg_of
from vishub.tasks.slide_analysis.encoders import Encoder, load_encoder
from vishub.tasks.slide_analysis.features import FeatureCache, SlideFeatures, extract, read_features
from vishub.tasks.slide_analysis.heatmap import heat_geojson, paint, scaled_heat
from vishub.tasks.slide_analysis.setting import SlideSetting
from vishub.tasks.slide_analysis.slides import Slide, open_slide
from vishub.tasks.slide_analysis.tissue import Regions, Tissue, find_tissue, make_regions

__all__ = ['NOTICE', 'SlideAnalysisPipeline', 'SlideAnalysisResult']

NOTICE = 'For research only. Not a medical device, not for diagnosis.'


@dataclass(frozen=True)
class Patch:
    """One of the patches that count most.

    Attributes:
        x, y, size: Level-0 pixels.
        score: Its share of the slide's heat, 0 to 1.
        picture: uint8 (S, S, 3), S the side of the encoder's pictures.
    """
    x: int
    y: int
    size: float
    score: float
    picture: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class SlideAnalysisResult(Result):
    """What a model says of a slide.

    Attributes:
        probabilities: Class -> probability among the classes of all tasks (class-incremental), in their order.
        by_task: Task -> class -> probability if the slide is known to be of that task (task-incremental).
        task: The task that was given, or None.
        coords: int64 (N, 2), left and top of the regions, level-0 pixels.
        region_size: Their side, level-0 pixels.
        region_heat: float32 (N,), share of each region in the class token's attention, sums to 1.
        patch_heat: float32 (N, g, g), share of each patch, sums to 1.
        patch_tissue: float32 (N, g, g), share of each patch that is tissue.
        overview: uint8 (H, W, 3).
        tissue: bool (H, W).
        downsample: Level-0 pixels a pixel of the overview.
        width, height, mpp: Of level 0: pixels, and micrometres a pixel.
        top_patches: The patches that count most, best first.
        model, num_params: Name and size of the network; the encoder is not counted.
        encoder: Name of the encoder.
        seconds: By stage: `tissue`, `read`, `encode`, `classify`.
        source: Path.
        warnings: What was guessed or left out, one sentence each.
    """
    suffixes = ('.png', '.overlay.png', '.geojson', '.json')

    probabilities: Mapping[str, float]
    by_task: Mapping[str, Mapping[str, float]]
    task: Optional[str]
    coords: np.ndarray = field(repr=False)
    region_size: float
    region_heat: np.ndarray = field(repr=False)
    patch_heat: np.ndarray = field(repr=False)
    patch_tissue: np.ndarray = field(repr=False)
    overview: np.ndarray = field(repr=False)
    tissue: np.ndarray = field(repr=False)
    downsample: float
    width: int
    height: int
    mpp: float
    top_patches: Sequence[Patch]
    model: str
    num_params: int
    encoder: str
    seconds: Mapping[str, float]
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()

    @property
    def predicted(self) -> str:
        """The most probable class, of the given task if there is one."""
        among = self.by_task[self.task] if self.task else self.probabilities
        return max(among, key=lambda label: among[label])

    def to_dict(self) -> Dict[str, Any]:
        """All but the pixels and the maps."""
        return {
            'source': self.source,
            'notice': NOTICE,
            'model': self.model,
            'encoder': self.encoder,
            'predicted': self.predicted,
            'task': self.task,
            'probabilities': {label: round(value, 6) for label, value in self.probabilities.items()},
            'by_task': {task: {label: round(value, 6) for label, value in values.items()}
                        for task, values in self.by_task.items()},
            'width': self.width,
            'height': self.height,
            'mpp': self.mpp,
            'num_regions': len(self.coords),
            'region_size': self.region_size,
            'regions': [
                {'x': int(x), 'y': int(y), 'attention': round(float(heat), 6)}
                for (x, y), heat in zip(self.coords, self.region_heat)],
            'top_patches': [
                {'x': patch.x, 'y': patch.y, 'size': patch.size, 'score': round(patch.score, 6)}
                for patch in self.top_patches],
            'tissue_share': round(float(self.tissue.mean()), 4),
            'seconds': {stage: round(value, 3) for stage, value in self.seconds.items()},
            'num_params': self.num_params,
            'warnings': list(self.warnings),
        }

    def summary(self) -> Sequence[str]:
        best = self.predicted
        among = self.by_task[self.task] if self.task else self.probabilities
        given = f' (task {self.task} given)' if self.task else ' among all classes'
        lines = [f'{best} {among[best]:.1%}{given}, {len(self.coords)} regions, {sum(self.seconds.values()):.1f} s']
        lines += [
            f'if it is {task}: ' + ', '.join(f'{label} {value:.1%}' for label, value in values.items())
            for task, values in self.by_task.items() if len(self.by_task) > 1]
        return [*lines, NOTICE]

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """Write the result whole or not at all.

        Args:
            path: `.overlay.png` for the overview with the heat map; `.geojson` for regions and the strongest patches
                as QuPath's objects; `.npz` for the arrays; `.png` or `.jpg` for `plot()`; `.json` for `to_dict()`.

        Raises:
            InputError: If the path ends otherwise.
            OSError: If the folder cannot be written.
        """
        path = Path(path)
        name = path.name.lower()
        if not name.endswith(('.overlay.png', '.geojson', '.npz')):
            return super().save(path)
        with atomic_path(path) as temporary:
            if name.endswith('.overlay.png'):
                self.overlay().save(temporary)
            elif name.endswith('.geojson'):
                temporary.write_text(json.dumps(self.geojson()), encoding='utf-8')
            else:
                np.savez_compressed(
                    temporary, coords=self.coords, region_heat=self.region_heat, patch_heat=self.patch_heat,
                    patch_tissue=self.patch_tissue, overview=self.overview, tissue=self.tissue)
        return path

    def heat(self, level: str = 'patch') -> np.ndarray:
        """The heat map scaled for the eye, float32 (N, g, g), 0 to 1: from the 1st to the 99th percentile of tissue.

        Args:
            level: `patch` or `region`.

        Raises:
            InputError: If the level is another.
        """
        if level not in ('patch', 'region'):
            raise InputError(f"level is '{level}': it is patch or region")
        heat = self.patch_heat if level == 'patch' else np.broadcast_to(
            self.region_heat[:, None, None], self.patch_heat.shape)
        return scaled_heat(heat, self.patch_tissue > 0)

    def overlay(self, level: str = 'patch', opacity: float = 0.6) -> Image.Image:
        """The overview with the heat map on it; what is no tissue stays as it is.

        Args:
            level: `patch` or `region`.
            opacity: Of the hottest places, 0 to 1.

        Raises:
            InputError: If an argument is out of range.
        """
        if not 0 <= opacity <= 1:
            raise InputError(f'opacity is {opacity}: it is 0 to 1')
        return paint(
            self.overview, self.coords / self.downsample, self.region_size / self.downsample, self.heat(level),
            self.patch_tissue > 0, opacity)

    def geojson(self) -> Dict[str, Any]:
        """Regions as annotations and the thousand strongest patches as tiles, for QuPath; level-0 pixels."""
        return heat_geojson(
            self.coords, self.region_size, self.region_heat, self.patch_heat, self.patch_tissue, self.predicted)

    def plot(self) -> Image.Image:
        """The slide with its heat map, and beside it the probabilities."""
        margin, header, side = 32, 76, 640
        picture = drawing.fit(self.overlay(), side, side)
        rows = sorted(self.probabilities.items(), key=lambda row: -row[1])[:5]
        height = max(picture.height, 52 * len(rows) + 44 + 30 * len(self.by_task)) + header + 60
        canvas = Image.new('RGB', (side + 3 * margin + 420, height), drawing.PAPER)
        draw = ImageDraw.Draw(canvas)
        title = f'{self.model}: {os.path.basename(self.source)}' if self.source else self.model
        draw.text((margin, 26), drawing.elide(title, drawing.font(22), canvas.width - 2 * margin), fill=drawing.INK,
                  font=drawing.font(22))
        canvas.paste(picture, (margin + (side - picture.width) // 2, header))
        left = side + 2 * margin
        drawing.draw_bars(draw, (left, header), 420, 52, rows)
        top = header + 52 * len(rows) + 24
        if len(self.by_task) > 1:
            draw.text((left, top), 'If the task is known', fill=drawing.INK, font=drawing.font(17))
            for number, (task, values) in enumerate(self.by_task.items(), 1):
                text = f'{task}: ' + ', '.join(f'{label} {value:.0%}' for label, value in values.items())
                draw.text((left, top + 28 * number), drawing.elide(text, drawing.font(15), 420), fill=drawing.MUTED,
                          font=drawing.font(15))
        draw.text((margin, height - 38), NOTICE, fill=drawing.MUTED, font=drawing.font(15))
        return canvas


class SlideAnalysisPipeline(Pipeline):
    """Say what class a slide has, and where that shows.

        pipe = SlideAnalysisPipeline('conslide_hit_tiny.procedural_he')
        result = pipe('slide.svs')
        result.save('slide.overlay.png')
        result.save('slide.geojson')     # opens in QuPath

    The slide is cut into regions at two scales, a frozen encoder turns each region and each of its patches into a
    vector, the network does the rest. One region is in memory at a time, whatever the size of the slide.

    Args:
        model: See `Pipeline`. A module needs the methods of `ConSlide`.
        device: See `Pipeline`.

    Raises:
        InputError: If the module takes no features of slides; or as `Pipeline` says.

    Attributes:
        setting: Tasks, encoder and tiling that the weights were trained with.
    """

    task = 'slide_analysis'
    default_model = 'conslide_hit_tiny.procedural_he'
    takes_pictures = False

    def __init__(
            self,
            model: Union[str, nn.Module, None] = None,
            device: Union[str, torch.device, None] = None,
    ):
        super().__init__(model, device)
        if not all(hasattr(self.model, name) for name in ('rollout', 'patch_saliency', 'in_features')):
            raise InputError(
                f"'{self.name}' takes no features of slides: give a model of ConSlide, such as "
                f'{self.default_model.partition(".")[0]}')
        module: Any = self.model
        if module.num_classes < 1:
            raise InputError(f"'{self.name}' has no classifier (num_classes 0): it gives features, no classes")
        self.setting = SlideSetting.of(pretrained_cfg_of(self.model), module.num_classes)
        self._encoders: Dict[Tuple[str, Optional[int], bool], Encoder] = {}

    def __call__(
            self,
            slide: Union[str, os.PathLike, Sequence[Union[str, os.PathLike]]],
            task: Optional[str] = None,
            mpp: Optional[float] = None,
            max_regions: Optional[int] = None,
            allow_image: bool = False,
            encoder: Optional[str] = None,
            encoder_size: Optional[int] = None,
            amp: bool = False,
            cache: Union[str, os.PathLike, None] = None,
            heat: str = 'attention',
            top_k: int = 6,
            progress: Optional[Progress] = None,
    ) -> Union[SlideAnalysisResult, List[SlideAnalysisResult]]:
        """Analyse one slide, or each of a list.

        Args:
            slide: Path of a whole-slide image, or a list of them; a list gives a list of results.
            task: Task that the slide is known to be of; it decides `predicted`.
            mpp: Micrometres a pixel, for files that do not say or say it wrongly.
            max_regions: Look at most at so many regions, those with most tissue.
            allow_image: Take a plain picture for a slide.
            encoder, encoder_size: Name for `load_encoder` and side of its pictures, for weights that do not say.
            amp: Encode in half precision.
            cache: Folder that keeps features: the same slide is then analysed at once the next time, and a broken
                off run goes on.
            heat: `attention`, or `grad`: how much each patch moves the logit of the predicted class.
            top_k: How many of the patches that count most are returned as pictures.
            progress: Called with (regions encoded, regions in all), summed over the slides.

        Raises:
            InputError: If a slide cannot be opened, says no resolution, or has no tissue, or an option is out of
                range (in a list: nothing is returned for the others either).
        """
        if heat not in ('attention', 'grad'):
            raise InputError(f"heat is '{heat}': it is attention or grad")
        if task is not None and task not in self.setting.tasks:
            raise InputError(f"task is '{task}': this model knows {', '.join(self.setting.tasks)}")
        if top_k < 0:
            raise InputError(f'top_k is {top_k}: give 0 or more')
        several = isinstance(slide, (list, tuple))
        paths: Sequence[Any] = slide if several else [slide]  # type: ignore[assignment]
        tiling = self.setting.tiling
        if max_regions is not None:
            tiling = replace(tiling, max_regions=max_regions)
        chosen = self._encoder(encoder, encoder_size, amp)
        store = FeatureCache(cache) if cache is not None else None
        results = []
        for number, path in enumerate(paths, 1):
            if not isinstance(path, (str, os.PathLike)):
                raise InputError(f'a slide is given as a path, not as a {type(path).__name__}: it is never read whole')
            try:
                with open_slide(path, mpp, allow_image) as opened:
                    begin = time.perf_counter()
                    tissue = find_tissue(opened, tiling)
                    regions = make_regions(opened, tissue, tiling)
                    seconds = {'tissue': time.perf_counter() - begin}
                    features = self._features(opened, regions, chosen, store, tiling, progress)
                    seconds.update({'read': 0., 'encode': 0., **features.seconds})
                    results.append(self._result(
                        opened, tissue, regions, features, chosen, seconds, task=task, heat=heat, top_k=top_k))
            except InputError as error:
                if not several:
                    raise
                raise InputError(f'slide {number} of {len(paths)}: {error}') from error.__cause__
        return results if several else results[0]

    def _encoder(self, name: Optional[str], size: Optional[int], amp: bool) -> Encoder:
        """The encoder, made once."""
        name, size = name or self.setting.encoder, size or self.setting.encoder_size
        module: Any = self.model
        if name is None:
            raise InputError(
                f"'{self.name}' does not say which encoder its features came from; pass encoder=, a classifier of "
                f'timm with {module.in_features} features')
        key = (name, size, amp)
        if key not in self._encoders:
            made = load_encoder(name, size, self.device, amp)
            if made.width != module.in_features:
                raise InputError(
                    f"encoder '{name}' has {made.width} outputs, '{self.name}' was built for {module.in_features}-"
                    'dimensional features: use the encoder it was trained with')
            self._encoders[key] = made
        return self._encoders[key]

    @staticmethod
    def _features(
            slide: Slide, regions: Regions, encoder: Encoder, store: Optional[FeatureCache], tiling: Any,
            progress: Optional[Progress],
    ) -> SlideFeatures:
        if store is None:
            return extract(slide, regions, encoder, None, progress)
        path = store.path(slide, encoder, tiling)
        if not path.is_file():
            return store.store(path, slide, regions, encoder, progress)
        if progress is not None:
            progress(len(regions), len(regions))
        return read_features(path)

    def _result(
            self, slide: Slide, tissue: Tissue, regions: Regions, features: SlideFeatures, encoder: Encoder,
            seconds: Dict[str, float], *, task: Optional[str], heat: str, top_k: int,
    ) -> SlideAnalysisResult:
        begin = time.perf_counter()
        logits, region_heat, patch_heat = self.classify(features, task, heat)
        seconds['classify'] = time.perf_counter() - begin
        all_classes = logits.softmax(0).tolist()
        by_task = {}
        for name, labels in self.setting.tasks.items():
            shares = logits[self.setting.numbers(name)].softmax(0).tolist()
            by_task[name] = dict(zip(labels, shares))
        assert slide.mpp is not None
        return SlideAnalysisResult(
            probabilities=dict(zip(self.setting.classes, all_classes)),
            by_task=by_task,
            task=task,
            coords=regions.coords,
            region_size=regions.size,
            region_heat=region_heat,
            patch_heat=patch_heat,
            patch_tissue=regions.patch_tissue,
            overview=tissue.overview,
            tissue=tissue.mask,
            downsample=tissue.downsample,
            width=slide.width,
            height=slide.height,
            mpp=slide.mpp,
            top_patches=_top_patches(slide, regions, patch_heat, encoder.size, top_k),
            model=self.name,
            num_params=self.num_params,
            encoder=encoder.name,
            seconds=seconds,
            source=slide.path,
            warnings=slide.warnings,
        )

    def classify(
            self,
            features: SlideFeatures,
            task: Optional[str] = None,
            heat: str = 'attention',
    ) -> Tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Features -> logits (K,), shares of the regions (N,) and of the patches (N, g, g), each summing to 1.

        Args:
            features: Of one slide.
            task: Task that the class asked about belongs to, for `heat='grad'`.
            heat: See `__call__`.

        Raises:
            InputError: If the network refuses the features.
        """
        module: Any = self.model
        patch, region = features.patch.to(self.device), features.region.to(self.device)
        try:
            with torch.inference_mode():
                logits = module(patch, region).logits[0].float().cpu()
                rollout = module.rollout(patch, region)
            region_heat = (rollout.region[0] / rollout.region[0].sum()).cpu().numpy()
            patch_heat = rollout.heat_map.cpu().numpy()
            if heat == 'grad':
                among = self.setting.numbers(task) if task else list(range(len(logits)))
                wanted = max(among, key=lambda number: float(logits[number]))
                saliency = module.patch_saliency(patch, region, class_index=wanted)
                patch_heat = (saliency / saliency.sum().clamp_min(1e-12)).cpu().numpy()
        except ValueError as error:  # the network's own checks
            raise InputError(f'the features of this slide cannot be used: {error}') from error
        return logits, region_heat, patch_heat


def _top_patches(slide: Slide, regions: Regions, heat: np.ndarray, side: int, count: int) -> List[Patch]:
    size = regions.size / regions.grid
    tissue = np.where(regions.patch_tissue > 0, heat, -1.)
    patches = []
    for place in np.argsort(-tissue, axis=None, kind='stable')[:count]:
        number, row, column = np.unravel_index(place, heat.shape)
        if tissue[number, row, column] < 0:
            break
        x, y = (round(float(regions.coords[number, axis] + size * step)) for axis, step in ((0, column), (1, row)))
        picture = slide.read(x, y, max(1, round(size)), max(1, round(size)), (side, side))
        patches.append(Patch(x, y, size, float(heat[number, row, column]), picture))
    return patches
