"""DICOM files, as far as every task that reads them needs: opened without letting an identifier out, and decoders.

Nothing of a file's header but what describes pixels, time and scale is read. pydicom's own warnings and errors quote
values of the header, so neither leaves this module (messages of vishub name the file and the fault, nothing else).
"""
import contextlib
import io
import logging
import os
import warnings
from typing import Any, BinaryIO, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np

from vishub.errors import InputError, import_extra
from vishub.tasks.video import VideoFrame, read_video

__all__ = ['Cine', 'is_dicom', 'open_cine', 'open_dicom', 'quiet', 'require_decoder']

# what decodes a compression, by a part of its name
_PACKAGES = (
    ('High-Throughput', 'pylibjpeg pylibjpeg-openjpeg'), ('JPEG 2000', 'pylibjpeg pylibjpeg-openjpeg'),
    ('JPEG', 'pylibjpeg pylibjpeg-libjpeg'), ('RLE', 'pylibjpeg pylibjpeg-rle'))
_VIDEO_SYNTAXES = '1.2.840.10008.1.2.4.10'  # 100 to 108: MPEG-2, H.264, H.265 as one stream
_TISSUE, _CENTIMETRES = 1, 3  # codes of ultrasound regions


class Cine(NamedTuple):
    """A multi-frame file.

    Attributes:
        size: Width and height of a frame.
        num_frames: As the header says.
        spacing: Centimetres between rows and between columns; None if the file does not say.
        warnings: What was guessed or left out, one sentence each.
        frames: uint8 RGB frames in order, decoded one by one, with their seconds since the first one.
    """
    size: Tuple[int, int]
    num_frames: int
    spacing: Optional[Tuple[float, float]]
    warnings: Tuple[str, ...]
    frames: Iterator[VideoFrame]


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file begins as DICOM files do; it is left at its beginning."""
    file.seek(128)
    magic = file.read(4)
    file.seek(0)
    return magic == b'DICM'


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor log lines of pydicom inside: they quote the header."""
    logger = logging.getLogger('pydicom')
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.disabled = before


def open_dicom(file: Union[str, os.PathLike, bytes], name: str, pixels: bool = True) -> Any:
    """Read a file as a pydicom dataset.

    Args:
        file: Path, or content.
        name: How messages call it.
        pixels: Read the pixels, too.

    Raises:
        InputError: If it is no DICOM file, or holds no picture.
        MissingExtraError: If pydicom is not installed (extra `medical`).
    """
    pydicom = import_extra('pydicom', 'medical')
    source = io.BytesIO(file) if isinstance(file, bytes) else os.fspath(file)
    with quiet():
        try:
            dataset = pydicom.dcmread(source, stop_before_pixels=not pixels)
            shape = dataset.get('Rows'), dataset.get('Columns')
        except Exception:  # a parser may raise anything on a damaged file, and its words quote the header
            raise InputError(f'{name} is no DICOM file that can be read: get it again from where it came') from None
    if not all(shape):
        fault = 'its content is encrypted' if 'EncryptedAttributesSequence' in dataset else \
            'it is a report or an index, or damaged'
        raise InputError(f'{name} holds no picture ({fault}): give a file with pixels that can be read')
    return dataset


def require_decoder(dataset: Any, name: str) -> None:
    """Raise InputError, naming the package to install, if nothing here can decode the pixels of a dataset."""
    pixels = import_extra('pydicom.pixels', 'medical')
    syntax = dataset.file_meta.get('TransferSyntaxUID') if hasattr(dataset, 'file_meta') else None
    if syntax is None:
        raise InputError(f'{name} does not say how its pixels are stored (no transfer syntax): save it anew')
    if not syntax.is_compressed:
        return
    try:
        if pixels.get_decoder(syntax).is_available:
            return
    except NotImplementedError:
        raise InputError(f'{name} is stored as {syntax.name}, which no package decodes: convert it first') from None
    packages = next((packages for part, packages in _PACKAGES if part in syntax.name), 'python-gdcm')
    raise InputError(
        f'{name} is compressed as {syntax.name}, and no decoder for that is installed: pip install {packages}')


def open_cine(file: Union[str, os.PathLike, bytes], name: str) -> Cine:
    """Open an ultrasound clip: multi-frame (or a single picture), RGB, YBR, palette or grey, 8 or more bits.

    Args:
        file: Path, or content.
        name: How messages call it.

    Raises:
        InputError: If it is none, or no installed decoder can read its pixels.
        MissingExtraError: If pydicom is not installed (extra `medical`).
    """
    dataset = open_dicom(file, name)
    with quiet():
        size = int(dataset.Columns), int(dataset.Rows)
        count = int(dataset.get('NumberOfFrames') or 1)
        spacing, fault = _spacing(dataset)
        told: List[str] = [fault] if fault else []
        modality = str(dataset.get('Modality') or 'US')
        if modality not in ('US', 'IVUS'):
            told.append(f'The file is of the modality {modality[:8]}, not ultrasound.')
        syntax = str(dataset.file_meta.get('TransferSyntaxUID', ''))
        times = _times(dataset, count)
    if 'PixelData' not in dataset:
        raise InputError(f'{name} has no pixels: give a file with a picture')
    if syntax.startswith(_VIDEO_SYNTAXES):
        stream = io.BytesIO(b''.join(_fragments(dataset)))
        return Cine(size, count, spacing, tuple(told), read_video(stream, name))
    require_decoder(dataset, name)
    return Cine(size, count, spacing, tuple(told), _decoded(dataset, times, name))


def _decoded(dataset: Any, times: Optional[np.ndarray], name: str) -> Iterator[VideoFrame]:
    from pydicom.pixels import apply_color_lut, iter_pixels

    with quiet():
        kind = str(dataset.get('PhotometricInterpretation', ''))
        bits = int(dataset.get('BitsStored', 8))
    frames = iter_pixels(dataset)  # YBR comes as RGB
    number = 0
    while True:
        with quiet():
            try:
                pixels = next(frames)
                if kind == 'PALETTE COLOR':
                    pixels, depth = apply_color_lut(pixels, dataset), 16
                else:
                    depth = bits
            except StopIteration:
                return
            except Exception:  # as in open_dicom
                raise InputError(
                    f'{name} is damaged or incomplete at frame {number}: get it again from where it came') from None
        pixels = _eight_bits(pixels, depth)
        if kind == 'MONOCHROME1':
            pixels = 255 - pixels
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        yield VideoFrame(
            np.ascontiguousarray(pixels[..., :3]), None if times is None else float(times[min(number, len(times) - 1)]))
        number += 1


def _eight_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Of the `bits` that a value has, the upper eight."""
    if pixels.dtype.kind == 'i':
        pixels = pixels.astype(np.int64) + (1 << (bits - 1))
    if pixels.dtype == np.uint8 and bits <= 8:
        return pixels
    return (pixels.astype(np.int64) >> max(0, bits - 8)).clip(0, 255).astype(np.uint8)


def _fragments(dataset: Any) -> Iterator[bytes]:
    from pydicom.encaps import generate_fragments, parse_basic_offsets

    buffer = io.BytesIO(dataset.PixelData)
    parse_basic_offsets(buffer)
    yield from generate_fragments(buffer)


def _times(dataset: Any, count: int) -> Optional[np.ndarray]:
    """Seconds of each frame since the first, or None."""
    vector, step = dataset.get('FrameTimeVector'), dataset.get('FrameTime')
    rate = dataset.get('RecommendedDisplayFrameRate') or dataset.get('CineRate')
    try:
        if vector is not None and len(vector) == count:
            times = np.cumsum([0., *(float(value) for value in vector[1:])]) / 1000
        elif step is not None and float(step) > 0:
            times = np.arange(count) * float(step) / 1000
        elif rate is not None and float(rate) > 0:
            times = np.arange(count) / float(rate)
        else:
            return None
    except (TypeError, ValueError):
        return None
    return times if np.isfinite(times).all() and (np.diff(times) > 0).all() else None


def _spacing(dataset: Any) -> Tuple[Optional[Tuple[float, float]], str]:
    """Centimetres between rows and columns, and what is wrong with them in a sentence, or nothing."""
    found = []
    for region in dataset.get('SequenceOfUltrasoundRegions') or ():
        units = region.get('PhysicalUnitsXDirection'), region.get('PhysicalUnitsYDirection')
        if region.get('RegionDataType') != _TISSUE or units != (_CENTIMETRES, _CENTIMETRES):
            continue
        right, bottom = int(region.RegionLocationMaxX1), int(region.RegionLocationMaxY1)
        if right > dataset.Columns or bottom > dataset.Rows:
            return None, 'The file gives a scale for a larger picture than it holds (it was scaled down without ' \
                         'correcting that), so areas are in pixels.'
        width, height = right - int(region.RegionLocationMinX0), bottom - int(region.RegionLocationMinY0)
        found.append((width * height, (abs(float(region.PhysicalDeltaY)), abs(float(region.PhysicalDeltaX)))))
    if found:
        spacing = max(found)[1]  # of the largest region
    else:
        millimetres = dataset.get('PixelSpacing')
        if not millimetres or len(millimetres) != 2:
            return None, ''
        spacing = float(millimetres[0]) / 10, float(millimetres[1]) / 10
    if not all(np.isfinite(value) and value > 0 for value in spacing):
        return None, 'The scale that the file gives is not positive, so areas are in pixels.'
    others = {value for _, value in found if value != spacing}
    return spacing, 'The file has regions of different scale; that of the largest one was taken.' if others else ''
