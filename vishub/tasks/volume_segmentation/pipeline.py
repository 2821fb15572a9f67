"""Segmentation of volumes: a scan in, a mask out that lies exactly on the scan's voxels. For research only."""
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.tasks.base import Pipeline, Progress, Result, pretrained_cfg_of
from vishub.tasks.volume_segmentation import mesh, picture
from vishub.tasks.volume_segmentation.preprocessing import Preprocessing, planes_to_grid
from vishub.tasks.volume_segmentation.sliding_window import sliding_planes
from vishub.tasks.volume_segmentation.volumes import Grid, Volume, VolumeInput, read_volume, write_nifti

__all__ = ['VolumeSegmentationPipeline', 'VolumeSegmentationResult']


@dataclass(frozen=True, eq=False)
class VolumeSegmentationResult(Result):
    """The class of every voxel of a scan. Nothing of it names the patient.

    Attributes:
        mask: uint8 (D, H, W): D from foot to head, H from back to front, W from left to right of the patient.
        grid: The scan's own geometry, in which the mask is saved.
        label_names: Names of the classes; the first is the background.
        grey: The scan's first channel to look at, uint8 (D, H, W).
        probabilities: float16 (K, D, H, W) from 0 to 1; None unless they were asked for.
        model: Name of the model.
        latency_ms: Milliseconds from the volume that was read to the mask.
        num_params: Parameters of the model.
        source: Path or file name; None for values given directly.
        warnings: What was guessed, one sentence each.
    """
    suffixes = ('.nii.gz', '.png', '.glb', '.json')

    mask: np.ndarray = field(repr=False)
    grid: Grid
    label_names: Tuple[str, ...]
    grey: np.ndarray = field(repr=False)
    probabilities: Optional[np.ndarray] = field(repr=False)
    model: str
    latency_ms: float
    num_params: int
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()

    @property
    def spacing(self) -> Tuple[float, float, float]:
        """Millimetres between voxels along D, H, W."""
        return self.grid.spacing

    @property
    def volumes_ml(self) -> Dict[str, float]:
        """Volume of each foreground class in millilitres: its voxels times a voxel's volume."""
        return {
            name: float(count) * self.grid.voxel_ml for name, count in zip(self.label_names[1:], self._counts()[1:])}

    def _counts(self) -> np.ndarray:
        """Voxels of each class; plane by plane, for counting takes 8 bytes a voxel."""
        return np.sum([np.bincount(plane.ravel(), minlength=len(self.label_names)) for plane in self.mask], axis=0)

    def mask_in_file_order(self) -> np.ndarray:
        """uint8 (i, j, k), along the axes of the scan's file: what `save('mask.nii.gz')` writes."""
        return np.ascontiguousarray(self.grid.to_file(self.mask))

    def to_dict(self) -> Dict[str, Any]:
        """All but the voxels."""
        return {
            'source': self.source,
            'model': self.model,
            'shape': list(self.grid.shape),
            'spacing_mm': [round(v, 5) for v in self.grid.file_spacing],
            'affine': self.grid.affine.tolist(),
            'classes': [
                {'label': number, 'name': name, 'voxels': int(count), 'ml': round(float(count) * self.grid.voxel_ml, 4)}
                for number, (name, count) in enumerate(zip(self.label_names, self._counts())) if number],
            'latency_ms': round(self.latency_ms, 3),
            'num_params': self.num_params,
            'research_only': True,
            'warnings': list(self.warnings),
        }

    def summary(self) -> Sequence[str]:
        depth, height, width = self.mask.shape
        lines = [f'{name}: {volume:,.2f} ml' for name, volume in self.volumes_ml.items()]
        return [*lines, f'{width} x {height} x {depth} voxels in {self.latency_ms / 1000:.1f} s. For research only.']

    def surfaces(self) -> List[mesh.Surface]:
        """The surface of each class, in millimetres right, anterior, superior."""
        count = len(self.label_names) - 1
        return mesh.surfaces(self.mask, self.grid.network_affine(), self.label_names[1:], picture.colours(count))

    def plane(self, axis: int, index: int, opacity: float = 0.45, side: int = 480) -> Image.Image:
        """One plane with the mask over it; `axis` is 0 axial, 1 coronal, 2 sagittal. See `picture.plane_picture`."""
        return picture.plane_picture(self.grey, self.mask, axis, index, self.spacing, opacity=opacity, side=side)

    def plot(self) -> Image.Image:
        """The planes with the most foreground, bare and with the mask, and the volumes."""
        title = f'{self.model}: {os.path.basename(self.source)}' if self.source else self.model
        size = ' x '.join(map(str, self.grid.shape))
        spacing = ' x '.join(f'{v:.3g}' for v in self.grid.file_spacing)
        cost = f'{self.num_params / 1e6:.1f} M parameters, {self.latency_ms / 1000:.1f} s'
        rows = [(name, f'{volume:,.2f} ml') for name, volume in self.volumes_ml.items()]
        return picture.sheet(self.grey, self.mask, self.spacing, title, f'{size} voxels of {spacing} mm; {cost}', rows)

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """Write the result whole or not at all.

        Args:
            path: `.nii.gz` or `.nii` for the mask, uint8, with the scan's own shape and affine; `.glb` (coloured),
                `.obj` or `.stl` for the surfaces; `.png`, `.jpg` or `.webp` for `plot()`; `.json` for `to_dict()`.

        Raises:
            InputError: If the path ends otherwise.
            OSError: If the folder cannot be written.
        """
        path = Path(path)
        name = path.name.lower()
        if name.endswith(('.nii', '.nii.gz')):
            return write_nifti(path, self.mask, self.grid)
        if name.endswith(('.json', '.png', '.jpg', '.jpeg', '.webp')):
            return super().save(path)
        if not name.endswith(('.glb', '.obj', '.stl')):
            raise InputError(
                f"cannot save a mask as '{path}': give a name that ends in .nii.gz, .nii, .glb, .obj, .stl, .png, .jpg "
                'or .json')
        encode = {'.glb': mesh.glb, '.obj': mesh.obj, '.stl': mesh.stl}[path.suffix.lower()]
        content = encode(self.surfaces())
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return path

    def save_probabilities(self, path: Union[str, os.PathLike]) -> Path:
        """Write the probabilities as NIfTI, float32 with the classes along the fourth axis, on the scan's grid.

        Raises:
            InputError: If they were not asked for, or the path does not end in .nii or .nii.gz.
        """
        if self.probabilities is None:
            raise InputError('there are no probabilities: ask for them, as in pipe(volume, probabilities=True)')
        return write_nifti(path, self.probabilities.astype(np.float32), self.grid)


class VolumeSegmentationPipeline(Pipeline):
    """Label each voxel of a CT or MR scan. For research only.

        pipe = VolumeSegmentationPipeline('mambaclinix_tiny.procedural')
        result = pipe('scan.nii.gz')
        result.save('mask.nii.gz')

    The scan is turned, resampled and normalised as the network's training data were; its logits are brought back to
    the scan's own voxels before they are compared, and the mask is written with the scan's affine.

    Args:
        model: See `Pipeline`. A module needs `patch_size` and `in_chans`, as MambaClinix has them.
        device: See `Pipeline`.

    Raises:
        InputError: If the module is no segmenter of volumes; or as `Pipeline` says.

    Attributes:
        label_names: Names of the classes, the background first.
        preprocessing: How a scan is prepared.
        patch_size: Of the windows that slide over it.
    """

    task = 'volume_segmentation'
    default_model = 'mambaclinix_tiny.procedural'
    takes_pictures = False

    def __init__(
            self,
            model: Union[str, nn.Module, None] = None,
            device: Union[str, torch.device, None] = None,
    ):
        super().__init__(model, device)
        module: Any = self.model
        if not all(hasattr(module, name) for name in ('patch_size', 'in_chans', 'num_classes')):
            raise InputError(
                f"'{self.name}' segments no volumes: give a model with patch_size, in_chans and num_classes, such as "
                f'{self.default_model.partition(".")[0]}')
        if module.num_classes < 2:
            raise InputError(f"'{self.name}' has lost its heads (reset_classifier(0)): it gives features, no classes")
        cfg = pretrained_cfg_of(module)
        names = tuple(cfg.get('label_names') or ())
        self.label_names: Tuple[str, ...] = names if len(names) == module.num_classes else (
            'background', *(f'class {number}' for number in range(1, module.num_classes)))
        self.patch_size: Tuple[int, ...] = tuple(module.patch_size)
        self.in_chans: int = module.in_chans
        self.preprocessing = Preprocessing.from_dict(cfg.get('preprocessing') or {})

    def __call__(
            self,
            volume: Union[VolumeInput, List[Any]],
            channel: Optional[int] = None,
            series: Optional[int] = None,
            spacing: Optional[Sequence[float]] = None,
            overlap: float = 0.5,
            mirror: bool = False,
            probabilities: bool = False,
            batch_size: int = 4,
            progress: Optional[Progress] = None,
    ) -> Union[VolumeSegmentationResult, List[VolumeSegmentationResult]]:
        """Segment one volume, or each of a list.

        Args:
            volume: As `read_volume` takes it; a list is of volumes, a tuple of the channels of one.
            channel: Of a 4-D file, which entry of its fourth axis to take, from 0.
            series: Of a folder with several DICOM series, the number of the one to take.
            spacing: Of an array, millimetres along D, H, W.
            overlap: By which share windows overlap, from 0 to 0.9.
            mirror: Average over mirrored copies: eight times the work.
            probabilities: Also keep them: 2 bytes a class and voxel.
            batch_size: Windows a forward pass.
            progress: Called with (windows done, windows in all), summed over the volumes as far as they were read.

        Raises:
            InputError: If a volume cannot be used (in a list: nothing is returned for the others either), or an option
                is out of range.
        """
        if not 0 <= overlap <= 0.9:
            raise InputError(f'overlap is {overlap}: give 0 to 0.9')
        if batch_size < 1:
            raise InputError(f'batch_size is {batch_size}: give 1 or more')
        several = isinstance(volume, list)
        results = []
        for number, item in enumerate(volume if several else [volume], 1):  # type: ignore[arg-type]
            try:
                read = read_volume(item, channel=channel, channels=self.in_chans, series=series, spacing=spacing)
                results.append(self._segment(read, overlap, mirror, probabilities, batch_size, progress))
            except InputError as error:
                if not several:
                    raise
                raise InputError(f'volume {number} of {len(volume)}: {error}') from error  # type: ignore[arg-type]
        return results if several else results[0]

    def _segment(
            self, volume: Volume, overlap: float, mirror: bool, probabilities: bool, batch_size: int,
            progress: Optional[Progress]) -> VolumeSegmentationResult:
        channels, *size = volume.data.shape
        if channels != self.in_chans:
            raise InputError(
                f"{volume.source or 'the volume'} has {channels} channel(s), '{self.name}' takes {self.in_chans}: give "
                'a tuple of as many files')
        begin = time.perf_counter()
        prepared = torch.from_numpy(self.preprocessing.prepare(volume.data, volume.spacing))
        mask = np.empty(size, np.uint8)
        kept = np.empty((len(self.label_names), *size), np.float16) if probabilities else None
        with torch.inference_mode():
            planes = sliding_planes(
                self.model, prepared, self.patch_size, overlap=overlap, mirror=mirror, batch_size=batch_size,
                device=self.device, advance=progress)
            for number, plane in enumerate(planes_to_grid(planes, prepared.shape[1], size)):
                if not bool(torch.isfinite(plane).all()):
                    raise InputError(f"'{self.name}' gave values that are not finite: its weights are damaged")
                mask[number] = plane.argmax(0).byte().numpy()
                if kept is not None:
                    kept[:, number] = plane.softmax(0).half().numpy()
        return VolumeSegmentationResult(
            mask=mask, grid=volume.grid, label_names=self.label_names, grey=picture.grey_values(volume.data[0]),
            probabilities=kept, model=self.name, latency_ms=1000 * (time.perf_counter() - begin),
            num_params=self.num_params, source=volume.source, warnings=(*volume.warnings, *self._doubts(volume)))

    def _doubts(self, volume: Volume) -> List[str]:
        """What about a scan does not fit the network."""
        doubts = []
        hounsfield = self.preprocessing.intensity == 'ct'
        if volume.modality and hounsfield != (volume.modality == 'CT') and volume.modality in ('CT', 'MR'):
            doubts.append(
                f'The scan is {volume.modality}; the network was trained on '
                f'{"CT" if hounsfield else "other grey values than those of CT"}.')
        if self.preprocessing.spacing is not None:
            for own, wanted in zip(volume.spacing, self.preprocessing.spacing):
                if own > 3 * wanted:
                    doubts.append(
                        f'Voxels of {own:.2g} mm are far coarser than the {wanted:.2g} mm that the network knows.')
                    break
        return doubts
