"""From a slide to the two tensors that the network takes, kept on disk for the next time."""
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Union

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.tasks.base import Progress
from vishub.tasks.slide_analysis.encoders import Encoder
from vishub.tasks.slide_analysis.slides import Slide
from vishub.tasks.slide_analysis.tissue import Regions, Tiling, find_tissue, make_regions

__all__ = ['FeatureCache', 'SlideFeatures', 'extract', 'read_features']

_PART = 16  # regions a part: what a kill costs at most
_BATCH = 64  # pictures a pass of the encoder


@dataclass(frozen=True, eq=False)
class SlideFeatures:
    """What is known of a slide once it has been encoded.

    Attributes:
        patch: (N, g, g, C) float, of the patches, row by row.
        region: (N, C) float, of the regions at the coarse scale.
        coords: int64 (N, 2), left and top of the regions in level-0 pixels.
        size: Side of a region in level-0 pixels; 0 where unknown (official HDF5 files).
        seconds: That each stage took: `read`, `encode`; empty if the features came from disk.
    """
    patch: torch.Tensor
    region: torch.Tensor
    coords: np.ndarray
    size: float
    seconds: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.region)


def extract(
        slide: Slide,
        regions: Regions,
        encoder: Encoder,
        parts: Optional[Path] = None,
        progress: Optional[Progress] = None,
) -> SlideFeatures:
    """Encode all regions, each as a whole and as a grid of patches.

    One region is in memory at a time. Patches without any tissue are white: the encoder is asked once for them.

    Args:
        slide: Open slide.
        regions: Of that slide.
        encoder: Frozen encoder.
        parts: Folder in which every 16 regions are kept, so that a broken off call goes on; None keeps nothing.
        progress: Called with (regions done, regions in all).
    """
    g, side, total = regions.grid, encoder.size, len(regions)
    white = encoder(np.full((1, side, side, 3), 255, np.uint8))
    seconds = {'read': 0., 'encode': 0.}
    patch_parts: List[torch.Tensor] = []
    region_parts: List[torch.Tensor] = []
    if progress is not None:
        progress(0, total)
    for first in range(0, total, _PART):
        part = None if parts is None else parts / f'{first:06d}.safetensors'
        numbers = range(first, min(first + _PART, total))
        kept = _kept(part, len(numbers), g, encoder.width)
        if kept is None:
            patch = white.expand(len(numbers) * g * g, -1).clone()
            pictures = np.empty((len(numbers), side, side, 3), np.uint8)
            for place, number in enumerate(numbers):
                begin = time.perf_counter()
                x, y = regions.coords[number].tolist()
                length = round(regions.size)
                pictures[place] = slide.read(x, y, length, length, (side, side))
                grid = slide.read(x, y, length, length, (g * side, g * side))
                # rows of patches, their pixel rows, columns, pixel columns -> patches
                patches = grid.reshape(g, side, g, side, 3).transpose(0, 2, 1, 3, 4).reshape(g * g, side, side, 3)
                tissue = np.flatnonzero(regions.patch_tissue[number].ravel() > 0)
                middle = time.perf_counter()
                for start in range(0, len(tissue), _BATCH):
                    chosen = tissue[start:start + _BATCH]
                    patch[torch.from_numpy(place * g * g + chosen)] = encoder(patches[chosen])
                seconds['read'] += middle - begin
                seconds['encode'] += time.perf_counter() - middle
                if progress is not None:
                    progress(number + 1, total)
            begin = time.perf_counter()
            kept = {'patch': patch.view(len(numbers), g, g, -1), 'region': encoder(pictures)}
            seconds['encode'] += time.perf_counter() - begin
            if part is not None:
                with atomic_path(part) as temporary:
                    save_file(kept, temporary)
        elif progress is not None:
            progress(numbers[-1] + 1, total)
        patch_parts.append(kept['patch'])
        region_parts.append(kept['region'])
    # rounded as they are stored, so that features made and features found give the same numbers
    stored = [torch.cat(tensors).half().float() for tensors in (patch_parts, region_parts)]
    return SlideFeatures(stored[0], stored[1], regions.coords, regions.size, seconds)


def _kept(part: Optional[Path], count: int, grid: int, width: int) -> Optional[Dict[str, torch.Tensor]]:
    """A part of a broken off call, if it is whole and of these sizes."""
    if part is None or not part.is_file():
        return None
    try:
        tensors = load_file(part)
    except Exception:  # safetensors has errors of its own; a damaged part is made anew
        return None
    fits = tensors.get('patch', torch.empty(0)).shape == (count, grid, grid, width)
    return tensors if fits and tensors.get('region', torch.empty(0)).shape == (count, width) else None


class FeatureCache:
    """Features on disk, one safetensors file for each slide, encoder and tiling.

    Args:
        folder: Where to keep them; made if need be.

    Raises:
        InputError: If the folder cannot be written.
    """

    def __init__(self, folder: Union[str, os.PathLike]) -> None:
        self.folder = Path(folder)
        try:
            with atomic_path(self.folder / '.write-test') as temporary:
                temporary.write_text('')
            (self.folder / '.write-test').unlink()
        except OSError as error:
            raise InputError(
                f"the cache '{folder}' cannot be written ({error.strerror or error}): give another folder") from error

    def path(self, slide: Slide, encoder: Encoder, tiling: Tiling) -> Path:
        """Where the features of a slide are: its content (size, first and last megabyte), not its name, decides."""
        key = hashlib.sha256(json.dumps([
            _fingerprint(slide.path), encoder.digest, slide.mpp, tiling.patch_size, tiling.grid, tiling.mpp,
            tiling.min_tissue, tiling.max_regions]).encode())
        return self.folder / f'{Path(slide.path).stem}.{key.hexdigest()[:16]}.safetensors'

    def get(
            self,
            slide: Slide,
            encoder: Encoder,
            tiling: Tiling,
            progress: Optional[Progress] = None,
    ) -> SlideFeatures:
        """The slide's features, from disk or made and stored. A call that was broken off goes on where it was.

        Raises:
            InputError: If the slide has no tissue, cannot be read, or the disk is full.
        """
        path = self.path(slide, encoder, tiling)
        if path.is_file():
            features = read_features(path)
            if progress is not None:
                progress(len(features), len(features))
            return features
        regions = make_regions(slide, find_tissue(slide, tiling), tiling)
        return self.store(path, slide, regions, encoder, progress)

    def store(
            self, path: Path, slide: Slide, regions: Regions, encoder: Encoder, progress: Optional[Progress] = None,
    ) -> SlideFeatures:
        """Make the features and store them at `path`, as float16."""
        parts = path.with_suffix('.parts')
        try:
            features = extract(slide, regions, encoder, parts, progress)
            with atomic_path(path) as temporary:
                save_file(
                    {'patch': features.patch.half(), 'region': features.region.half(),
                     'coords': torch.from_numpy(features.coords)},
                    temporary, metadata={'size': repr(features.size), 'encoder': encoder.name})
        except OSError as error:
            raise InputError(
                f"the cache '{self.folder}' cannot be written ({error.strerror or error}): make room or give another "
                'folder') from error
        shutil.rmtree(parts, ignore_errors=True)
        return features


def read_features(path: Union[str, Path]) -> SlideFeatures:
    """Features that `FeatureCache` stored, or an HDF5 file in the official layout.

    That has `features` (N, g, g, C), `features2` (N, C) and `coords` (N, 2), without the size of a region.

    Raises:
        InputError: If the file cannot be read or has not these tensors.
        MissingExtraError: If h5py is not installed and needed.
    """
    path = Path(path)
    try:
        if path.suffix.lower() in ('.h5', '.hdf5'):
            h5py: Any = import_extra('h5py', 'slides')
            with h5py.File(path, 'r') as file:
                patch, region = (torch.from_numpy(np.asarray(file[key])).float() for key in ('features', 'features2'))
                coords = np.asarray(file['coords'], dtype=np.int64)
            size = 0.
        else:
            with safe_open(str(path), framework='pt') as file:
                patch, region = (file.get_tensor(key).float() for key in ('patch', 'region'))
                coords = file.get_tensor('coords').numpy()
                size = float((file.metadata() or {}).get('size', 0.))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each library has errors of its own
        raise InputError(f"'{path}' holds no features of a slide: {error}") from error
    is_whole = patch.ndim == 4 and region.ndim == 2 and len(patch) == len(region) == len(coords) > 0
    if not is_whole or patch.shape[1] != patch.shape[2] or patch.shape[3] != region.shape[1]:
        raise InputError(
            f"'{path}' has features {tuple(patch.shape)} and {tuple(region.shape)}: (N, g, g, C) and (N, C) are needed")
    return SlideFeatures(patch, region, coords, size, {})


def _fingerprint(path: str, chunk: int = 1 << 20) -> str:
    """SHA-256 over a file's size, its first and its last megabyte: slides are too large to be read whole for a name."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, 'rb') as file:
        digest.update(file.read(chunk))
        file.seek(max(0, size - chunk))
        digest.update(file.read(chunk))
    return digest.hexdigest()
