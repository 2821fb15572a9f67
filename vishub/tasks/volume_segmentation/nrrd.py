"""NRRD files: http://teem.sourceforge.net/nrrd/format.html, in as far as scanners and 3D Slicer write them."""
import re
import zlib
from pathlib import Path
from typing import Dict, Tuple

import numpy as np

from vishub.errors import InputError
from vishub.tasks.volume_segmentation.volumes import UNKNOWN_ORIENTATION, Grid, Volume, one_line

__all__ = ['read_nrrd']

_NRRD_TYPES = {
    'signed char': 'i1', 'int8': 'i1', 'int8_t': 'i1', 'uchar': 'u1', 'unsigned char': 'u1', 'uint8': 'u1',
    'uint8_t': 'u1', 'short': 'i2', 'short int': 'i2', 'signed short': 'i2', 'int16': 'i2', 'int16_t': 'i2',
    'ushort': 'u2', 'unsigned short': 'u2', 'uint16': 'u2', 'uint16_t': 'u2', 'int': 'i4', 'signed int': 'i4',
    'int32': 'i4', 'int32_t': 'i4', 'uint': 'u4', 'unsigned int': 'u4', 'uint32': 'u4', 'uint32_t': 'u4',
    'longlong': 'i8', 'int64': 'i8', 'uint64': 'u8', 'float': 'f4', 'double': 'f8',
}
# the patient's axes that a space counts along, as signs of right, anterior, superior
_NRRD_SPACES = {
    'right-anterior-superior': (1, 1, 1), 'ras': (1, 1, 1), 'left-anterior-superior': (-1, 1, 1), 'las': (-1, 1, 1),
    'left-posterior-superior': (-1, -1, 1), 'lps': (-1, -1, 1),
}


def read_nrrd(path: Path) -> Volume:
    """Read a 3-D NRRD of one file, raw or gzip.

    Raises:
        InputError: If it is none, or damaged.
    """
    content = path.read_bytes()
    head, gap, body = content.partition(b'\n\n')
    if b'\r\n\r\n' in content and (not gap or content.index(b'\r\n\r\n') < len(head)):
        head, gap, body = content.partition(b'\r\n\r\n')
    lines = head.decode('ascii', 'replace').splitlines()
    if not lines or not lines[0].startswith('NRRD'):
        raise InputError(f"'{path}' is no NRRD file: it does not begin with NRRD")
    fields = {key.strip().lower(): value.strip() for key, found, value in (
        line.partition(':') for line in lines[1:] if not line.startswith('#') and ':=' not in line) if found}
    if 'data file' in fields or 'datafile' in fields:
        raise InputError(f"'{path}' has its voxels in another file: give a NRRD with header and voxels in one")
    try:
        shape = tuple(int(v) for v in fields['sizes'].split())
        dtype = np.dtype(_NRRD_TYPES[fields['type'].lower()])
        encoding = fields.get('encoding', 'raw').lower()
    except (KeyError, ValueError) as error:
        raise InputError(f"'{path}' is no NRRD of numbers: {one_line(error)}") from error
    if len(shape) != 3:
        raise InputError(f"'{path}' has {len(shape)} axes ({fields['sizes']}): give a volume of three")
    if encoding in ('gzip', 'gz'):
        try:
            body = zlib.decompressobj(wbits=31).decompress(body, int(np.prod(shape)) * dtype.itemsize)
        except zlib.error as error:
            raise InputError(f"'{path}' is damaged: {error}") from error
    elif encoding != 'raw':
        raise InputError(f"'{path}' is stored as {encoding}: raw and gzip are read")
    if dtype.itemsize > 1:
        dtype = dtype.newbyteorder('>' if fields.get('endian', 'little').lower() == 'big' else '<')
    needed = int(np.prod(shape)) * dtype.itemsize
    if len(body) < needed:
        raise InputError(f"'{path}' is cut off: {len(body):,} of {needed:,} bytes of voxels are there")
    values = np.frombuffer(body, dtype, int(np.prod(shape))).reshape(shape, order='F').astype(np.float32)
    affine, warnings = _nrrd_affine(path, fields)
    grid = Grid(shape, affine)
    return Volume(grid.to_network(values)[None].copy(), grid, source=str(path), warnings=warnings)


def _nrrd_affine(path: Path, fields: Dict[str, str]) -> Tuple[np.ndarray, Tuple[str, ...]]:
    affine = np.eye(4)
    signs = _NRRD_SPACES.get(fields.get('space', '').lower())
    vectors = re.findall(r'\(([^)]*)\)', fields.get('space directions', ''))
    try:
        if len(vectors) == 3:
            affine[:3, :3] = np.array([[float(v) for v in vector.split(',')] for vector in vectors]).T
        elif 'spacings' in fields:
            affine[:3, :3] = np.diag([float(v) for v in fields['spacings'].split()])
        origin = re.findall(r'\(([^)]*)\)', fields.get('space origin', ''))
        if origin:
            affine[:3, 3] = [float(v) for v in origin[0].split(',')]
    except ValueError as error:
        raise InputError(f"the geometry of '{path}' cannot be read: {error}") from error
    if signs is None:
        return affine, (UNKNOWN_ORIENTATION,)
    affine[:3] *= np.array(signs)[:, None]
    return affine, ()
