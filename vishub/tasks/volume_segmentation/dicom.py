"""A DICOM series as a volume: a folder or a zip of single images, or one multi-frame file.

Only geometry, grey values and the modality are looked at. Names, dates and numbers of patients are read by nobody here
and reach no message, result or file.
"""
import contextlib
import dataclasses
import io
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Tuple

import numpy as np

from vishub.errors import InputError, import_extra
from vishub.tasks.volume_segmentation.volumes import MAX_VOXELS, Grid, Volume, one_line

__all__ = ['is_dicom', 'read_series']

_MAX_FILES, _MAX_BYTES = 20_000, 8 << 30  # of a zip, unpacked
# What decodes a compressed transfer syntax, by how its UID begins; RLE needs nothing.
_DECODERS = {
    '1.2.840.10008.1.2.4.9': 'pylibjpeg pylibjpeg-openjpeg',  # JPEG 2000
    '1.2.840.10008.1.2.4.8': 'pylibjpeg pylibjpeg-libjpeg',  # JPEG-LS
    '1.2.840.10008.1.2.4.5': 'pylibjpeg pylibjpeg-libjpeg',  # JPEG
    '1.2.840.10008.1.2.4.7': 'pylibjpeg pylibjpeg-libjpeg',  # JPEG, lossless
    '1.2.840.10008.1.2.4.2': 'pylibjpeg pylibjpeg-openjpeg',  # High-Throughput JPEG 2000
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Slice:
    """One plane: what it takes to place it, and where its voxels are."""
    file: str
    frame: int
    position: np.ndarray  # of the first voxel, mm left, posterior, superior
    rows: np.ndarray  # unit vector along a row (to the next column), then along a column
    columns: np.ndarray
    spacing: Tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM files do."""
    with open(path, 'rb') as file:
        return file.read(132)[128:] == b'DICM'


def read_series(path: Path, series: Optional[int] = None) -> Volume:
    """Read a series as one volume.

    Args:
        path: Folder (and what is below it), zip, or file.
        series: Number of the series to take, where there are several.

    Raises:
        InputError: If there is no image, several series and no choice, a slice is missing or there twice, slices differ
            in size or direction, or the images are encrypted or compressed in a way that nothing here can undo.
    """
    import_extra('pydicom', 'medical')
    with _files(path) as files:
        groups: Dict[str, List[str]] = {}
        heads: Dict[str, Any] = {}
        for name in files.names():
            head = _head(files, name)
            if head is not None:
                groups.setdefault(str(head.get('SeriesInstanceUID', '')), []).append(name)
                heads[name] = head
        if not groups:
            raise InputError(f"'{path}' holds no DICOM images")
        chosen = _chosen(path, groups, heads, series)
        slices = [part for name in chosen for part in _slices(path, name, heads[name])]
        order, step, warnings = _sorted(path, slices)
        first = heads[chosen[0]]
        data = _voxels(path, files, heads, order)
    grid = _grid(order, step, data.shape)
    turned = grid.to_network(data.transpose(2, 1, 0))
    modality = str(first.get('Modality', ''))
    return Volume(turned[None], grid, modality=modality, source=str(path), warnings=warnings)


class _Files:
    """Files of a folder or of a zip, alike."""

    def __init__(self, path: Path, archive: Optional[zipfile.ZipFile]):
        self.path, self.archive = path, archive

    def names(self) -> List[str]:
        if self.archive is not None:
            return sorted(info.filename for info in self.archive.infolist() if not info.is_dir())
        if self.path.is_file():
            return [str(self.path)]
        return sorted(str(Path(folder) / name) for folder, _, names in os.walk(self.path) for name in names)

    def open(self, name: str) -> BinaryIO:
        if self.archive is not None:
            return io.BytesIO(self.archive.read(name))
        return open(name, 'rb')


@contextlib.contextmanager
def _files(path: Path) -> Iterator[_Files]:
    if path.is_dir() or not path.name.lower().endswith('.zip'):
        yield _Files(path, None)
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"'{path}' is no zip: {one_line(error)}") from error
    with archive:
        infos = archive.infolist()
        if len(infos) > _MAX_FILES or sum(info.file_size for info in infos) > _MAX_BYTES:
            raise InputError(
                f"'{path}' unpacks to more than {_MAX_FILES:,} files or {_MAX_BYTES >> 30} GB: give one series")
        if any(info.flag_bits & 1 for info in infos):
            raise InputError(f"'{path}' is encrypted: unpack it, and give the folder")
        try:
            yield _Files(path, archive)
        except (zipfile.BadZipFile, EOFError) as error:
            raise InputError(f"'{path}' is a damaged zip: {one_line(error)}") from error


def _head(files: _Files, name: str) -> Optional[Any]:
    """What stands before the voxels; None for what is no DICOM image."""
    pydicom = import_extra('pydicom', 'medical')
    with files.open(name) as file:
        try:
            head = pydicom.dcmread(file, stop_before_pixels=True)
        except Exception:  # other files lie in such folders, and what they lead to is not foreseeable
            return None
    return head if 'Rows' in head and 'Columns' in head else None


def _chosen(path: Path, groups: Dict[str, List[str]], heads: Dict[str, Any], series: Optional[int]) -> List[str]:
    numbers = {uid: int(heads[names[0]].get('SeriesNumber', None) or 0) for uid, names in groups.items()}
    if series is not None:
        found = [uid for uid, number in numbers.items() if number == series]
        if len(found) != 1:
            raise InputError(
                f"'{path}' has {len(found) or 'no'} series of number {series}; there are "
                f'{", ".join(map(str, sorted(numbers.values())))}')
        return groups[found[0]]
    if len(groups) > 1:
        listed = ', '.join(
            f'{numbers[uid]} ({heads[names[0]].get("Modality", "?")}, {len(names)} images)'
            for uid, names in sorted(groups.items(), key=lambda item: numbers[item[0]]))
        raise InputError(f"'{path}' mixes {len(groups)} series: choose one, as in series={max(numbers.values())}; "
                         f'there are {listed}')
    return next(iter(groups.values()))


def _slices(path: Path, name: str, head: Any) -> Iterator[_Slice]:
    """The planes of one file."""
    if 'EncryptedAttributesSequence' in head:
        raise InputError(f"'{path}' is encrypted: give images that are not")
    photometric = str(head.get('PhotometricInterpretation', 'MONOCHROME2'))
    if photometric not in ('MONOCHROME1', 'MONOCHROME2'):
        raise InputError(f"'{path}' holds {photometric} pictures: give a series of grey values, such as CT or MR")
    shared = _first(head, 'SharedFunctionalGroupsSequence')
    frames = list(head.get('PerFrameFunctionalGroupsSequence', [])) or [None]
    if len(frames) == 1 and int(head.get('NumberOfFrames', None) or 1) > 1:
        raise InputError(f"'{path}' is a cine or a stack that does not say where its frames lie: give a volume")
    for number, frame in enumerate(frames):
        def fact(keyword: str, sequence: str, frame: Any = frame) -> Any:
            for owner in (_first(frame, sequence), _first(shared, sequence), head):
                if owner is not None and owner.get(keyword) is not None:
                    return owner.get(keyword)
            return None

        direction = fact('ImageOrientationPatient', 'PlaneOrientationSequence')
        position = fact('ImagePositionPatient', 'PlanePositionSequence')
        spacing = fact('PixelSpacing', 'PixelMeasuresSequence')
        if direction is None or position is None or spacing is None:
            raise InputError(
                f"'{path}' has images that do not say where they lie (ImagePositionPatient, ImageOrientationPatient, "
                'PixelSpacing): they are no volume')
        vectors = np.array([float(v) for v in direction]).reshape(2, 3)
        yield _Slice(
            name, number, np.array([float(v) for v in position]), vectors[0], vectors[1],
            (float(spacing[0]), float(spacing[1])),
            float(_or(fact('RescaleSlope', 'PixelValueTransformationSequence'), 1)),
            float(_or(fact('RescaleIntercept', 'PixelValueTransformationSequence'), 0)))


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def _first(owner: Any, sequence: str) -> Any:
    items = owner.get(sequence) if owner is not None else None
    return items[0] if items else None


def _sorted(path: Path, slices: List[_Slice]) -> Tuple[List[_Slice], np.ndarray, Tuple[str, ...]]:
    """The planes in order along their normal, the step from one to the next (mm), and warnings."""
    first = slices[0]
    if len(slices) < 2:
        raise InputError(f"'{path}' has one image, which is no volume: give all images of the series")
    for part in slices:
        if not (np.allclose(part.rows, first.rows, atol=1e-3) and np.allclose(part.columns, first.columns, atol=1e-3)):
            raise InputError(f"'{path}' has images turned against each other, such as localisers: leave them out")
        if not np.allclose(part.spacing, first.spacing, rtol=1e-3):
            raise InputError(f"'{path}' has images of different pixel spacing: give one series of one volume")
    normal = np.cross(first.rows, first.columns)
    order = sorted(slices, key=lambda part: float(part.position @ normal))
    heights = np.array([part.position @ normal for part in order])
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if usual < 1e-4 or gaps.min() < 0.1 * usual:
        raise InputError(f"'{path}' has several images at one place, such as phases or echoes: give one volume")
    wrong = np.flatnonzero(np.abs(gaps - usual) > 0.1 * usual)
    if len(wrong):
        at = int(wrong[0])
        raise InputError(
            f"'{path}' lacks slices: between images {at + 1} and {at + 2} of {len(order)} there are {gaps[at]:.2f} mm "
            f'instead of {usual:.2f} mm')
    step = (order[-1].position - order[0].position) / (len(order) - 1)
    off = [np.abs(part.position - order[0].position - number * step).max() for number, part in enumerate(order)]
    warnings: Tuple[str, ...] = ()
    if max(off) > 0.5 * usual:
        raise InputError(f"the slices of '{path}' do not lie on one line: they are no volume")
    if np.linalg.norm(np.cross(step, normal)) > 0.02 * usual:
        warnings = ('The slices are sheared against each other (a tilted gantry); the mask is too, as the scan is.',)
    return order, step, warnings


def _voxels(path: Path, files: _Files, heads: Dict[str, Any], order: List[_Slice]) -> np.ndarray:
    """float32 (slices, rows, columns) in the scan's unit."""
    head = heads[order[0].file]
    shape = (len(order), int(head.Rows), int(head.Columns))
    if int(np.prod(shape)) > MAX_VOXELS:
        raise InputError(f"'{path}' has {int(np.prod(shape)):,} voxels; at most {MAX_VOXELS:,} are read")
    data = np.empty(shape, np.float32)
    opened: Tuple[str, np.ndarray] = ('', np.empty(0))
    for place, part in enumerate(order):
        if opened[0] != part.file:
            opened = (part.file, _pixels(path, files, part.file))
        plane = opened[1][part.frame] if opened[1].ndim == 3 else opened[1]
        if plane.shape != shape[1:]:
            sizes = ' and of '.join(f'{rows} x {columns}' for rows, columns in (plane.shape, shape[1:]))
            raise InputError(f"'{path}' has images of {sizes} pixels: give one series")
        data[place] = plane.astype(np.float32) * np.float32(part.slope) + np.float32(part.intercept)
    if str(head.get('PhotometricInterpretation', '')) == 'MONOCHROME1':  # where low is bright
        data = data.max() + data.min() - data
    return data


def _pixels(path: Path, files: _Files, name: str) -> np.ndarray:
    pydicom = import_extra('pydicom', 'medical')
    with files.open(name) as file:
        image = pydicom.dcmread(file)
    syntax = getattr(image.file_meta, 'TransferSyntaxUID', None)
    if syntax is not None and syntax.is_compressed and not _decodable(syntax):
        packages = next((value for key, value in _DECODERS.items() if str(syntax).startswith(key)), None)
        right = f'pip install {packages}' if packages else 'export the series without compression'
        raise InputError(f"'{path}' is compressed as {syntax.name}, which nothing here can decode: {right}")
    if 'PixelData' not in image:
        raise InputError(f"'{path}' has an image without voxels")
    try:
        return np.asarray(image.pixel_array)
    except Exception as error:  # cut off, or wrong facts about its own size
        raise InputError(f"an image of '{path}' is damaged: {one_line(error)}") from error


def _decodable(syntax: Any) -> bool:
    pixels = import_extra('pydicom.pixels', 'medical')
    try:
        return bool(pixels.get_decoder(syntax).is_available)
    except NotImplementedError:  # a syntax that pydicom does not know
        return False


def _grid(order: List[_Slice], step: np.ndarray, shape: Tuple[int, ...]) -> Grid:
    first = order[0]
    affine = np.eye(4)
    affine[:3, 0] = first.rows * first.spacing[1]
    affine[:3, 1] = first.columns * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    affine[:2] *= -1  # DICOM counts to the left and to the back
    return Grid((shape[2], shape[1], shape[0]), affine)
