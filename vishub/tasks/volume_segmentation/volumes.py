"""Scans as files: NIfTI, NRRD, and DICOM series (see `dicom.py`), with their geometry, and masks in the same geometry.

A file stores voxels along three axes of its own, and an affine that says where in the scanner each voxel lies. The
network always sees a volume turned the same way: D from foot to head, H from back to front, W from left to right of the
patient, as near as permuting and flipping axes comes; nothing is rotated or interpolated for that, so that the way back
is exact. A mask is written with the scan's own shape and affine, whatever they are: oblique, anisotropic, left-handed.

A mask says nothing about the patient: of the scan's header nothing but the geometry is taken over.
"""
import contextlib
import dataclasses
import gzip
import os
import re
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path

__all__ = [
    'MAX_VOXELS', 'UNKNOWN_ORIENTATION', 'Grid', 'Volume', 'VolumeInput', 'one_line', 'read_volume', 'write_nifti',
]

MAX_VOXELS = 1 << 30
UNKNOWN_ORIENTATION = 'The file does not say how the patient lies; the usual order of axes is assumed.'
_NIFTI = ('.nii', '.nii.gz', '.mgz', '.mgh', '.img', '.hdr')
_NRRD = ('.nrrd', '.nhdr')

VolumeInput = Union[str, os.PathLike, np.ndarray, 'Volume', Sequence[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a file lie.

    Attributes:
        shape: Voxels along the file's three axes i, j, k.
        affine: float64 (4, 4): (i, j, k, 1) to millimetres right, anterior, superior of the scanner's origin.
        header: Geometry fields of a NIfTI header, to be written as they were read; empty if it was another file.
    """
    shape: Tuple[int, int, int]
    affine: np.ndarray
    header: Dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise InputError('the affine of the volume is not finite: its geometry is damaged')
        if abs(np.linalg.det(self.affine[:3, :3])) < 1e-12 or min(self.file_spacing) <= 0:
            raise InputError('the affine of the volume is singular: a spacing is 0, or two axes are the same')

    @property
    def file_spacing(self) -> Tuple[float, float, float]:
        """Millimetres between voxels along i, j, k."""
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))  # type: ignore[return-value]

    @property
    def orientation(self) -> np.ndarray:
        """(3, 2): for each file axis the nearest of right, anterior, superior, and 1 or -1 for its sense."""
        nibabel = import_extra('nibabel', 'medical')
        return nibabel.io_orientation(self.affine)

    @property
    def spacing(self) -> Tuple[float, float, float]:
        """Millimetres between voxels along D, H, W."""
        own = self.file_spacing
        by_axis = {int(axis): own[i] for i, (axis, _) in enumerate(self.orientation)}
        return by_axis[2], by_axis[1], by_axis[0]

    @property
    def voxel_ml(self) -> float:
        """Millilitres of a voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def to_network(self, data: np.ndarray) -> np.ndarray:
        """(i, j, k) -> a view (D, H, W)."""
        axes, flips = self._turn()
        return data[flips].transpose(axes)

    def to_file(self, data: np.ndarray) -> np.ndarray:
        """(D, H, W) -> a view (i, j, k): the inverse of `to_network`, exactly."""
        axes, flips = self._turn()
        return data.transpose(np.argsort(axes))[flips]

    def network_affine(self) -> np.ndarray:
        """float64 (4, 4): (d, h, w, 1) to the same millimetres as `affine`."""
        axes, flips = self._turn()
        flip = np.eye(4)
        for axis, part in enumerate(flips):
            if part.step == -1:
                flip[axis, axis], flip[axis, 3] = -1, self.shape[axis] - 1
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for network, file in enumerate(axes):
            turn[file, network] = 1
        return self.affine @ flip @ turn

    def _turn(self) -> Tuple[List[int], Tuple[slice, ...]]:
        orientation = self.orientation
        flips = tuple(slice(None, None, -1 if sense < 0 else 1) for _, sense in orientation)
        file_axis = {int(axis): i for i, (axis, _) in enumerate(orientation)}
        return [file_axis[2], file_axis[1], file_axis[0]], flips


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """A scan, turned as the network wants it.

    Attributes:
        data: float32 (C, D, H, W) in the scan's own unit.
        grid: Its geometry, of the file.
        modality: `CT`, `MR` … where the file says so, else empty.
        source: Path or file name; None for values given directly.
        warnings: What was guessed or left out, one sentence each.
    """
    data: np.ndarray = dataclasses.field(repr=False)
    grid: Grid
    modality: str = ''
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()

    @property
    def affine(self) -> np.ndarray:
        """That of the file."""
        return self.grid.affine

    @property
    def spacing(self) -> Tuple[float, float, float]:
        """Millimetres between voxels along D, H, W."""
        return self.grid.spacing


def read_volume(
        source: VolumeInput,
        *,
        channel: Optional[int] = None,
        channels: Optional[int] = None,
        series: Optional[int] = None,
        spacing: Optional[Sequence[float]] = None,
        constant: bool = False,
) -> Volume:
    """Read a scan.

    Args:
        source: One of
            * a NIfTI (.nii, .nii.gz) or NRRD (.nrrd) file. If its name ends in `_0000` and several channels are
              wanted, those beside it (`_0001` …) are read too, as nnU-Net names them;
            * a folder or a zip of one DICOM series, or one multi-frame DICOM file;
            * a list of these, one a channel, all on one grid;
            * an array (D, H, W) or (C, D, H, W), D from foot to head, H from back to front, W from left to right;
            * a `Volume`, which stays as it is.
        channel: Of a 4-D file, which entry of the fourth axis to take, from 0.
        channels: How many channels are wanted; a 4-D file with as many gives them all.
        series: Of a folder with several DICOM series, the number of the one to take.
        spacing: Of an array, millimetres along D, H, W; 1 by default.
        constant: Let volumes pass whose values are all the same, as label files may be.

    Raises:
        InputError: If it is no such thing, is damaged, is 2-D, 4-D without a chosen channel, empty, constant, or has
            values that are not finite.
    """
    if isinstance(source, Volume):
        volume = source
    elif isinstance(source, np.ndarray) or type(source).__module__ == 'torch':
        volume = _from_array(source, spacing)
    elif isinstance(source, (list, tuple)):
        volume = _joined([
            read_volume(part, channel=channel, series=series, constant=constant) for part in source])
    else:
        path = Path(os.fspath(source))  # type: ignore[arg-type]
        beside = _channels_beside(path, channels or 1)
        if len(beside) > 1:
            volume = _joined([read_volume(part, channel=channel, constant=constant) for part in beside])
        else:
            volume = _from_path(path, channel, channels, series)
    _check(volume, constant)
    return volume


def _from_path(path: Path, channel: Optional[int], channels: Optional[int], series: Optional[int]) -> Volume:
    from vishub.tasks.volume_segmentation import dicom, nrrd  # they import this module

    name = path.name.lower()
    if not path.exists():
        raise InputError(f"'{path}' does not exist")
    if path.is_dir() or name.endswith('.zip'):
        return dicom.read_series(path, series)
    if name.endswith(_NIFTI):
        return _read_nifti(path, channel, channels)
    if name.endswith(_NRRD):
        return nrrd.read_nrrd(path)
    if dicom.is_dicom(path):
        return dicom.read_series(path, series)
    raise InputError(
        f"'{path}' is no volume: give NIfTI (.nii, .nii.gz), NRRD (.nrrd), or a folder or a zip of a DICOM series")


def _from_array(source: Any, spacing: Optional[Sequence[float]]) -> Volume:
    data = np.asarray(source)
    if data.ndim not in (3, 4) or not data.size:
        raise InputError(f'an array of shape {data.shape} is no volume: give (D, H, W) or (C, D, H, W)')
    if not (np.issubdtype(data.dtype, np.number) or data.dtype == bool) or np.iscomplexobj(data):
        raise InputError(f'an array of {data.dtype} is no volume: give real numbers')
    data = (data if data.ndim == 4 else data[None]).astype(np.float32)
    lengths = tuple(float(v) for v in (spacing if spacing is not None else (1., 1., 1.)))
    if len(lengths) != 3 or not all(np.isfinite(v) and v > 0 for v in lengths):
        raise InputError(f'spacing is {spacing}: give three positive lengths in mm, along D, H, W')
    depth, height, width = data.shape[1:]
    return Volume(data, Grid((width, height, depth), np.diag([*lengths[::-1], 1.])))


def _joined(parts: Sequence[Volume]) -> Volume:
    if not parts:
        raise InputError('there is no channel: give one file a channel')
    first = parts[0]
    for number, part in enumerate(parts[1:], 2):
        if part.grid.shape != first.grid.shape or not np.allclose(part.affine, first.affine, atol=1e-3):
            raise InputError(
                f'channel {number} lies on another grid than the first ({part.grid.shape}, {first.grid.shape}): '
                'resample it first')
    return dataclasses.replace(
        first, data=np.concatenate([part.data for part in parts]), warnings=sum((part.warnings for part in parts), ()))


def _channels_beside(path: Path, channels: int) -> List[Path]:
    """`scan_0000.nii.gz` -> it and `scan_0001.nii.gz`, … as many as are wanted."""
    match = re.fullmatch(r'(.+)_0000(\.\w+(?:\.gz)?)', path.name)
    if match is None or channels < 2:
        return [path]
    files = [path.with_name(f'{match[1]}_{number:04}{match[2]}') for number in range(channels)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"'{path}' is the first of {channels} channels, but {', '.join(missing)} is not beside it")
    return files


def _check(volume: Volume, constant: bool) -> None:
    name = f"'{volume.source}'" if volume.source else 'the volume'
    channels, *size = volume.data.shape
    if not volume.data.size:
        raise InputError(f'{name} is empty: it has {" x ".join(map(str, size))} voxels')
    if volume.data[0].size > MAX_VOXELS:
        raise InputError(f'{name} has {volume.data[0].size:,} voxels; at most {MAX_VOXELS:,} are read')
    if min(size) < 2:
        raise InputError(f'{name} has {" x ".join(map(str, size))} voxels, which is a picture: give a volume')
    for number, values in enumerate(volume.data):
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            count = int(values.size - np.isfinite(values).sum())
            raise InputError(f'{name} has {count:,} voxels that are not finite numbers')
        if low == high and not constant:
            which = f' in channel {number}' if channels > 1 else ''
            raise InputError(f'{name} is {low:g} everywhere{which}: there is nothing to see')


# -- NIfTI ------------------------------------------------------------------------------------------------------------

_GEOMETRY = (
    'qform_code', 'sform_code', 'quatern_b', 'quatern_c', 'quatern_d', 'qoffset_x', 'qoffset_y', 'qoffset_z',
    'srow_x', 'srow_y', 'srow_z', 'xyzt_units', 'sizeof_hdr')


def _read_nifti(path: Path, channel: Optional[int], channels: Optional[int]) -> Volume:
    nibabel = import_extra('nibabel', 'medical')
    try:
        image = nibabel.load(path)
        shape, dtype = image.shape, image.get_data_dtype()
    except Exception as error:  # nibabel raises what the damage leads to
        raise InputError(f"'{path}' cannot be read as NIfTI: {one_line(error)}") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if dtype.fields is not None or np.issubdtype(dtype, np.complexfloating):
        raise InputError(f"'{path}' holds {dtype}: give one real grey value a voxel, no colours")
    if len(shape) < 3 or len(shape) == 3 and 1 in shape:
        raise InputError(f"'{path}' is two-dimensional ({' x '.join(map(str, shape))}): give a volume")
    if 0 in shape:
        raise InputError(f"'{path}' is empty: {' x '.join(map(str, shape))} voxels")
    if len(shape) > 4:
        raise InputError(f"'{path}' has {len(shape)} axes: give a volume, or a 4-D file and a channel")
    if int(np.prod(shape[:3])) > MAX_VOXELS:
        raise InputError(f"'{path}' has {int(np.prod(shape[:3])):,} voxels; at most {MAX_VOXELS:,} are read")
    chosen: Sequence[Any] = [...]
    if len(shape) == 4:
        chosen = _entries(path, shape[3], channel, channels)
    header = image.header
    grid = Grid(shape[:3], np.asarray(image.affine, np.float64), _geometry_of(header))
    try:
        with np.errstate(all='ignore'):
            whole = image.dataobj
            values = [np.asarray(whole[entry] if entry is not ... else whole, np.float32).reshape(shape[:3])
                      for entry in chosen]
    except Exception as error:  # cut off, or its compression is damaged
        raise InputError(f"'{path}' is damaged: {one_line(error)}") from error
    # one channel is a view: a second copy of a large scan would be its peak of memory
    turned = [grid.to_network(part) for part in values]
    data = turned[0][None] if len(turned) == 1 else np.stack(turned)
    unknown = grid.header and not (int(header['sform_code']) or int(header['qform_code']))
    return Volume(data, grid, source=str(path), warnings=(UNKNOWN_ORIENTATION,) if unknown else ())


def _entries(path: Path, count: int, channel: Optional[int], channels: Optional[int]) -> List[Any]:
    if channel is not None:
        if not 0 <= channel < count:
            raise InputError(f"'{path}' has {count} entries along its fourth axis; channel is {channel}, from 0")
        return [(..., channel)]
    if channels == count and count > 1:
        return [(..., number) for number in range(count)]
    raise InputError(
        f"'{path}' is four-dimensional, with {count} volumes: choose one, as in channel=0 (--option channel=0)")


def _geometry_of(header: Any) -> Dict[str, Any]:
    names = header.keys() if hasattr(header, 'keys') else ()
    if 'sform_code' not in names:  # MGH and others: the affine says it all
        return {}
    return {**{name: np.array(header[name]) for name in _GEOMETRY}, 'pixdim': np.array(header['pixdim'])[:4]}


def write_nifti(path: Union[str, os.PathLike], data: np.ndarray, grid: Grid) -> Path:
    """Write values on a scan's grid, whole or not at all; nothing else of the scan gets into the file.

    Args:
        path: Ends in .nii or .nii.gz.
        data: (D, H, W), or (C, D, H, W), which is written with the channels as its fourth axis; of a type that NIfTI
            knows.
        grid: That of the scan.

    Raises:
        InputError: If the path ends otherwise.
    """
    nibabel = import_extra('nibabel', 'medical')
    path = Path(path)
    if not path.name.lower().endswith(('.nii', '.nii.gz')):
        raise InputError(f"cannot write a mask as '{path}': give a name that ends in .nii or .nii.gz")
    parts = [grid.to_file(part) for part in (data if data.ndim == 4 else data[None])]
    values = np.stack(parts, -1) if data.ndim == 4 else np.ascontiguousarray(parts[0])
    second = int(grid.header.get('sizeof_hdr', 0)) == 540 or max(grid.shape) > 32767  # what NIfTI-1 cannot count
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    image = kind(values, grid.affine)
    image.header.set_xyzt_units('mm')
    for name, value in grid.header.items():
        if name == 'pixdim':
            image.header['pixdim'][:4] = value
        elif name != 'sizeof_hdr':
            image.header[name] = value
    # an image made without an affine takes that of its header, bit by bit as the scan's
    image = kind(values, None if grid.header else grid.affine, image.header)
    with _whole(path) as temporary:
        nibabel.save(image, temporary)
    return path


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """`atomic_path` for names with two suffixes: nibabel tells by the name whether to compress."""
    if not path.name.lower().endswith('.nii.gz'):
        with atomic_path(path) as temporary:
            yield temporary
        return
    with atomic_path(path) as temporary:
        inner = temporary.with_name(f'{temporary.stem}.nii')
        try:
            yield inner
            with open(inner, 'rb') as plain, gzip.open(temporary, 'wb', compresslevel=4) as packed:
                shutil.copyfileobj(plain, packed)
        finally:
            inner.unlink(missing_ok=True)


def one_line(error: Exception) -> str:
    """What a library's error says, fit for a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
