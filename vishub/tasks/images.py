"""The one place where pictures are decoded: whatever a user hands in becomes an upright RGB image, or an `InputError`.

Nothing here writes, and the size is read from the header before any pixel is decoded.
"""
import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator, List, Optional, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vishub.errors import InputError

__all__ = [
    'FORMATS', 'MAX_PIXELS', 'SUFFIXES', 'DecodedImage', 'ImageInput', 'decode_image', 'images_in', 'walk_images',
]

ImageInput = Union[str, os.PathLike, bytes, BinaryIO, Image.Image, np.ndarray, torch.Tensor]

MAX_PIXELS = 80_000_000  # 240 MB as RGB; below the size at which Pillow starts to warn of decompression bombs

# Raster formats with a signature. Not those that run another program (EPS) or that any bytes may pass for (TGA).
FORMATS = ('AVIF', 'BMP', 'GIF', 'HEIF', 'JPEG', 'JPEG2000', 'MPO', 'PNG', 'PPM', 'TIFF', 'WEBP')
SUFFIXES = frozenset((
    '.avif', '.bmp', '.gif', '.heic', '.heif', '.jp2', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
    '.webp',
))
_READABLE = 'a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF picture'

_URL = re.compile(r'(?i)^([a-z][a-z0-9+.-]+://|data:)')


@dataclass(frozen=True)
class DecodedImage:
    """A picture, ready for any model.

    Attributes:
        image: RGB, 8 bits a channel, turned as its EXIF orientation asks, transparency laid on white.
        source: Path or file name it came from; None for pixels given directly.
        warnings: What was left out or guessed, one sentence each (for instance that an animation has more frames).
    """
    image: Image.Image
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()


def decode_image(image: ImageInput, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decode and check one picture.

    16-bit grey is scaled to 8 bits, CMYK, grey and palette pictures become RGB, transparency is laid on white, EXIF
    orientation is applied, and of an animation the first frame is taken.

    Args:
        image: One of

            * path to a file in one of `FORMATS`;
            * its content as bytes, or a file object opened for reading bytes (read from where it stands);
            * PIL image of any mode;
            * array of shape H x W, H x W x 1, H x W x 3 or H x W x 4 (RGB, RGBA) of uint8, uint16 (0..65535) or
              floating point numbers 0..1;
            * tensor of shape H x W or C x H x W with C of 1, 3 or 4, of the same types and ranges.
        max_pixels: Pictures with more pixels are refused before they are decoded.

    Raises:
        InputError: If it is none of these, is damaged, or is too large; the message names the input, the fault and
            what would be right.
    """
    if isinstance(image, (str, os.PathLike)):
        return _decode_path(image, max_pixels)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode_file(io.BytesIO(image), f'the picture of {len(image):,} bytes', None, max_pixels)
    if isinstance(image, Image.Image):
        return _from_pil(image, max_pixels)
    if isinstance(image, torch.Tensor):
        return DecodedImage(_to_rgb(Image.fromarray(_pixels_of_tensor(image, max_pixels)), 'the tensor'))
    if isinstance(image, np.ndarray):
        return DecodedImage(_to_rgb(Image.fromarray(_pixels_of_array(image, max_pixels)), 'the array'))
    if callable(getattr(image, 'read', None)):
        return _decode_file_object(image, max_pixels)
    raise InputError(
        f'cannot read a picture from a {type(image).__name__}: give a path, bytes, a file opened in binary mode, '
        f'a PIL image, a numpy array or a tensor'
    )


def images_in(folder: Union[str, os.PathLike]) -> List[Path]:
    """The files in a folder and the folders below it whose names end like pictures, sorted; hidden ones left out.

    Raises:
        InputError: If there is none.
    """
    found = sorted(map(Path, walk_images(folder)))
    if not found:
        raise InputError(f"the folder '{folder}' holds no pictures: give one with files such as .jpg, .png or .webp")
    return found


def walk_images(folder: Union[str, os.PathLike]) -> Iterator[str]:
    """As `images_in`, one after the other: only the names of one folder at a time are in memory.

    A folder's own pictures come first, sorted, then its sub-folders, sorted. Links to folders are not followed, and
    folders that may not be read are passed over.
    """
    for root, folders, files in os.walk(os.fspath(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(files):
            path = os.path.join(root, name)
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith('.') and os.path.isfile(path):
                yield path


def _decode_path(path: Union[str, os.PathLike], max_pixels: int) -> DecodedImage:
    source = os.fspath(path)
    if isinstance(source, bytes):
        source = os.fsdecode(source)
    name = f"'{source}'" if source.isprintable() else repr(source)  # a message stays one line
    if _URL.match(source):
        shown = source if len(source) <= 80 else source[:77] + '...'
        raise InputError(f"'{shown}' is an address, not a file: download it first and give the path of the file")
    try:
        file = Path(source)
        if file.is_dir():
            raise InputError(f'{name} is a folder: give the picture files in it')
        if not file.exists():
            raise InputError(f'{name} does not exist: give the path of {_READABLE}')
        if not file.is_file():
            raise InputError(f'{name} is not an ordinary file: give the path of {_READABLE}')
        with open(file, 'rb') as opened:
            return _decode_file(opened, name, source, max_pixels)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # no permission, name too long, NUL in the name
        raise InputError(f'{name} cannot be opened ({error}): give the path of a readable picture file') from error


def _decode_file_object(file: BinaryIO, max_pixels: int) -> DecodedImage:
    source = getattr(file, 'name', None)
    source = source if isinstance(source, str) else None
    name = f"'{source}'" if source else 'the file object'
    try:
        content = file.read()
    except (OSError, ValueError) as error:  # ValueError: closed, or text that is no UTF-8
        raise InputError(f"{name} cannot be read ({error}): open it with open(path, 'rb')") from error
    if not isinstance(content, (bytes, bytearray)):
        raise InputError(f"{name} gives text, not bytes: open it with open(path, 'rb')")
    return _decode_file(io.BytesIO(content), name, source, max_pixels)


def _decode_file(file: BinaryIO, name: str, source: Optional[str], max_pixels: int) -> DecodedImage:
    if not file.read(1):
        raise InputError(f'{name} is empty (0 bytes): give {_READABLE}')
    file.seek(0)
    Image.init()
    try:
        opened = Image.open(file, formats=tuple(name for name in FORMATS if name in Image.OPEN))
    except UnidentifiedImageError as error:
        raise InputError(f'{name} is not a picture, whatever its name says: give {_READABLE}') from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r'\((\d+) pixels\)', str(error))
        raise _too_large(name, f'{int(count[1]):,} pixels' if count else 'too many pixels', max_pixels) from error
    except Exception as error:  # a decoder may raise anything at all on a damaged header
        raise _damaged(name, error) from error
    with opened:
        _check_size(name, opened.size, max_pixels)
        warnings = _frame_warnings(opened)
        try:
            opened.load()
            image = _to_rgb(_upright(opened), name)
        except InputError:
            raise
        except Exception as error:  # as above, for damaged pixels
            raise _damaged(name, error) from error
    return DecodedImage(image, source, warnings)


def _from_pil(image: Image.Image, max_pixels: int) -> DecodedImage:
    source = getattr(image, 'filename', None) or None
    name = f"'{source}'" if source else f'the PIL image of mode {image.mode}'
    _check_size(name, image.size, max_pixels)
    warnings = _frame_warnings(image)
    try:
        image.load()  # an image opened by the caller may still be undecoded, and damaged
        rgb = _to_rgb(_upright(image), name)
    except InputError:
        raise
    except Exception as error:  # as in _decode_file
        raise _damaged(name, error) from error
    # The result must not change when the caller goes on drawing on the original.
    return DecodedImage(rgb.copy() if rgb is image else rgb, os.fspath(source) if source else None, warnings)


def _check_size(name: str, size: Tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f'{name} is {width} x {height} pixels: give a picture of at least one pixel')
    if width * height > max_pixels:
        raise _too_large(name, f'{width:,} x {height:,} pixels', max_pixels)


def _too_large(name: str, size: str, max_pixels: int) -> InputError:
    return InputError(f'{name} has {size}, more than the {max_pixels:,} that are allowed: scale it down first')


def _damaged(name: str, error: Exception) -> InputError:
    reason = str(error).strip().rstrip('.') or type(error).__name__
    return InputError(f'{name} is damaged or incomplete ({reason}): get it again from where it came, or save it anew')


def _frame_warnings(image: Image.Image) -> Tuple[str, ...]:
    # An MPO is a phone's JPEG with a preview or depth map behind the picture: nothing is missed there.
    if image.format != 'MPO' and getattr(image, 'is_animated', False):
        which = 'page' if image.format == 'TIFF' else 'frame'
        return (f'The picture has several {which}s; only the {"shown" if image.tell() else "first"} one was used.',)
    return ()


def _upright(image: Image.Image) -> Image.Image:
    # EXIF is full of faults in the wild; a picture with an unreadable orientation is shown as it is stored.
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith('I;16') or image.mode in ('I', 'F'):
        # Wider than 8 bits, grey: the same ranges as for arrays. Mode I is how Pillow may open a 16-bit PNG.
        array = np.asarray(image)
        if array.dtype.kind in 'iu':
            if array.min() < 0 or array.max() > 65535:
                raise InputError(f'{name} has values {array.min()}..{array.max()}: scale them to 0..65535')
            array = array.astype(np.uint16)
        return Image.fromarray(_to_uint8(array, name)).convert('RGB')
    if image.has_transparency_data:
        layer = image.convert('RGBA')
        white = Image.new('RGBA', layer.size, 'white')
        return Image.alpha_composite(white, layer).convert('RGB')
    try:
        return image if image.mode == 'RGB' else image.convert('RGB')
    except ValueError as error:  # LAB, for instance
        raise InputError(f'{name} has colours of mode {image.mode}, which cannot be shown: save it as RGB') from error


def _pixels_of_tensor(tensor: torch.Tensor, max_pixels: int) -> np.ndarray:
    shape = ' x '.join(map(str, tensor.shape)) or 'no dimension'
    name = f'the tensor ({shape}, {str(tensor.dtype).removeprefix("torch.")})'
    right = 'give C x H x W with 1, 3 or 4 channels, or H x W; several pictures go in a list'
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4)):
        raise InputError(f'{name} is not a picture: {right}')
    if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
        raise InputError(f'{name} has no plain pixel values: give uint8, or floating point numbers 0..1')
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy knows no bfloat16
    if tensor.ndim == 3:
        tensor = tensor.permute(1, 2, 0)  # C, H, W -> H, W, C
    return _pixels(tensor.numpy(), name, max_pixels)


def _pixels_of_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    shape = ' x '.join(map(str, array.shape)) or 'no dimension'
    name = f'the array ({shape}, {array.dtype})'
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        right = 'give H x W, H x W x 3 or H x W x 4; several pictures go in a list'
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            right = 'its channels come first: give array.transpose(1, 2, 0)'
        raise InputError(f'{name} is not a picture: {right}')
    return _pixels(array, name, max_pixels)


def _pixels(array: np.ndarray, name: str, max_pixels: int) -> np.ndarray:
    """H x W (x C) of any number type -> the same in uint8, without the last dimension if it is 1."""
    _check_size(name, (array.shape[1], array.shape[0]), max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return np.ascontiguousarray(_to_uint8(array, name))


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return np.round(array / np.float32(257)).astype(np.uint8)  # 65535 -> 255
    if array.dtype.kind != 'f':
        raise InputError(f'{name} has values of type {array.dtype}: give uint8, uint16, or floating point 0..1')
    if not np.isfinite(array).all():
        raise InputError(f'{name} has values that are not finite (NaN or infinity): give numbers 0..1')
    low, high = float(array.min()), float(array.max())
    if low < -1e-3 or high > 1 + 1e-3:  # resampling and rounding may overshoot a little
        hint = 'divide by 255, or give uint8' if low >= 0 and 1 < high <= 255 else 'scale them to 0..1'
        raise InputError(f'{name} has values {low:.4g}..{high:.4g} where 0..1 is expected: {hint}')
    return np.round(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
