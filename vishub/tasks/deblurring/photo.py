"""Photographs with all that belongs to them: 8 or 16 bits, grey, colour or alpha, orientation, metadata.

A deblurred photograph is to be the same file but sharper. So pixels stay as they are stored (not turned upright), and
EXIF, colour profile, resolution and text are carried over. What is wrong with a file is said by `decode_image`.
"""
import io
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Optional, Tuple, Union, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from vishub.errors import InputError, MissingExtraError, import_extra
from vishub.files import atomic_path
from vishub.tasks.images import ImageInput, decode_image

__all__ = ['Photo', 'read_photo', 'upright']

_SUFFIXES = {'JPEG': '.jpg', 'MPO': '.jpg', 'PNG': '.png', 'WEBP': '.webp', 'TIFF': '.tif', 'BMP': '.bmp'}
_FORMATS = {
    '.jpg': 'JPEG', '.jpeg': 'JPEG', '.png': 'PNG', '.webp': 'WEBP', '.tif': 'TIFF', '.tiff': 'TIFF', '.bmp': 'BMP'}
# Description, camera, resolution (x, y, unit), software, date, artist, XMP, copyright, IPTC, colour profile. Not the
# orientation: 16-bit TIFFs are read upright.
_TIFF_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 700, 33432, 33723, 34675}
_PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph as it is stored.

    Attributes:
        pixels: uint8 or uint16, H x W x C with C of 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA).
        suffix: Of its format, e.g. `.jpg`; `.png` for pixels given directly.
        metadata: Pillow's arguments of `save` that carry over what is not pixels.
        chunks: Of a PNG, the stored chunks besides pixels, for 16-bit colour, which Pillow does not write.
        tags: Of a TIFF with 16-bit colour, likewise: (code, type, count, value) as tifffile takes them.
        source: Path or file name.
        warnings: What was converted or left out, one sentence each.
    """
    pixels: np.ndarray = field(repr=False)
    suffix: str = '.png'
    metadata: Dict[str, Any] = field(default_factory=dict, repr=False)
    chunks: bytes = field(default=b'', repr=False)
    tags: Tuple[Tuple[int, int, int, Any], ...] = field(default=(), repr=False)
    source: Optional[str] = None
    warnings: Tuple[str, ...] = ()

    @property
    def white(self) -> int:
        return 255 if self.pixels.dtype == np.uint8 else 65535

    def rgb(self, pixels: np.ndarray) -> np.ndarray:
        """Stored values of a part -> colours without alpha, float32 0..1, H x W x 3."""
        colours = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
        return colours.astype(np.float32) / self.white

    def stored(self, rgb: np.ndarray, out: np.ndarray) -> None:
        """The inverse: write colours, float H x W x 3, to `out`, in its kind; alpha there stays as it is."""
        colours = rgb if out.shape[-1] >= 3 else rgb.mean(-1, keepdims=True)
        out[..., :colours.shape[-1]] = np.round(colours.clip(0, 1) * self.white).astype(out.dtype)

    def picture(self, pixels: Optional[np.ndarray] = None) -> Image.Image:
        """These pixels (its own by default) as an 8-bit picture, upright: L, LA, RGB or RGBA."""
        image = Image.fromarray(_eight_bits(self.pixels if pixels is None else pixels))
        return upright(image, self.metadata.get('exif'))

    def save(self, path: Union[str, os.PathLike], pixels: Optional[np.ndarray] = None) -> Path:
        """Write these pixels (its own by default) with the photograph's metadata, whole or not at all.

        Args:
            path: Ends in .jpg, .png, .webp, .tif or .bmp. 16 bits are kept in .png and .tif, alpha not in .jpg.
            pixels: As `self.pixels`.

        Raises:
            InputError: If the path ends otherwise.
        """
        path = Path(path)
        pixels = self.pixels if pixels is None else pixels
        suffix = path.suffix.lower()
        if suffix not in _FORMATS:
            raise InputError(f"cannot save a picture as '{path}': give a name that ends in {', '.join(_FORMATS)}")
        with atomic_path(path) as temporary:
            if pixels.dtype == np.uint16 and suffix in ('.png', '.tif', '.tiff'):
                if suffix == '.png':
                    temporary.write_bytes(_png_16(pixels, self.chunks))
                else:
                    _write_tiff_16(temporary, pixels, self.tags)
                return path
            image = Image.fromarray(_eight_bits(pixels))
            if suffix in ('.jpg', '.jpeg', '.bmp') and image.mode in ('LA', 'RGBA'):
                image = image.convert('RGB' if image.mode == 'RGBA' else 'L')
            options = {'quality': 95} if suffix in ('.jpg', '.jpeg', '.webp') else {}
            if suffix in ('.jpg', '.jpeg'):
                options['subsampling'] = 0
            image.save(temporary, format=_FORMATS[suffix], **{**self.metadata, **options})
        return path


def upright(image: Image.Image, exif: Optional[bytes]) -> Image.Image:
    """`image` turned as these EXIF data ask."""
    if not exif:
        return image
    try:
        data = Image.Exif()
        data.load(exif)
        image = image.copy()
        image.getexif()[ExifTags.Base.Orientation] = data.get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is full of faults in the wild: shown as it is stored
        return image


def read_photo(image: ImageInput) -> Photo:
    """Read a photograph as it is stored.

    Palette and CMYK pictures become RGB, with a warning; an animation gives its first frame.

    Args:
        image: What `decode_image` takes; of arrays and tensors uint16 and floating point numbers keep 16 bits.

    Raises:
        InputError: As `decode_image`.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        decode_image(image)  # says what is wrong with it
        return Photo(_stored_array(image))
    if isinstance(image, Image.Image):
        checked = decode_image(image)
        return _from_pil(image, b'', checked.source, checked.warnings)
    source = image if isinstance(image, (str, os.PathLike)) else getattr(image, 'name', None)
    if isinstance(image, (bytes, bytearray, memoryview)):
        content = bytes(image)
        checked = decode_image(content)
    elif callable(getattr(image, 'read', None)):
        kept: Any = _Kept(image)
        checked = decode_image(cast(BinaryIO, kept))  # says what is wrong with the file object
        content = kept.content
    else:
        checked = decode_image(image)  # says what is wrong with the path, or with what is none
        content = Path(os.fsdecode(cast(str, image))).read_bytes()
    source = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else None
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        return _from_pil(opened, content, source, checked.warnings)


class _Kept:
    """A file object that keeps what was read from it."""

    def __init__(self, file: Any) -> None:
        self.file, self.content = file, b''

    def read(self) -> Any:
        self.content = self.file.read()
        return self.content


def _stored_array(values: Union[np.ndarray, torch.Tensor]) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
        values = values.transpose(1, 2, 0) if values.ndim == 3 else values
    values = values[..., None] if values.ndim == 2 else values
    if values.dtype.kind == 'f':
        return np.round(values.clip(0, 1) * 65535).astype(np.uint16)
    return np.ascontiguousarray(values)


def _from_pil(image: Image.Image, content: bytes, source: Optional[str], warnings: Tuple[str, ...]) -> Photo:
    info = dict(image.info)
    metadata = {key: info[key] for key in ('exif', 'icc_profile', 'dpi', 'xmp') if info.get(key)}
    if 'exif' not in metadata and (exif := image.getexif()):
        metadata['exif'] = exif.tobytes()
    if image.format == 'PNG' and (text := getattr(image, 'text', None)):
        from PIL.PngImagePlugin import PngInfo

        metadata['pnginfo'] = PngInfo()
        for key, value in text.items():
            metadata['pnginfo'].add_text(key, str(value))
    if image.mode == 'CMYK':  # its profile is for four inks
        metadata.pop('icc_profile', None)
        warnings += ('The picture was CMYK; the result is RGB.',)
    deep = _sixteen_bits(image, content)
    if isinstance(deep, str):
        warnings += (deep,)
        deep = None
    tags: Tuple[Tuple[int, int, int, Any], ...] = ()
    if deep is not None:
        pixels = deep
        if image.format == 'TIFF':
            tags, left_out = _tiff_tags(image)
            warnings += left_out
    elif image.mode.startswith('I;16') or image.mode in ('I', 'F'):
        values = np.asarray(image)
        pixels = values.astype(np.uint16) if values.dtype.kind in 'iu' else _stored_array(values)[..., 0]
    else:
        if image.mode == 'P':
            warnings += ('The picture had a palette; the result has full colours.',)
        mode = image.mode if image.mode in ('L', 'LA', 'RGB', 'RGBA') else None
        if mode is None:
            mode = 'L' if image.mode == '1' else 'RGBA' if image.has_transparency_data else 'RGB'
        elif mode in ('L', 'RGB') and image.has_transparency_data:  # one colour counts as transparent
            mode = 'RGBA'
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    suffix = _SUFFIXES.get(image.format or '', '.png')
    chunks = _png_chunks(content) if suffix == '.png' else b''
    return Photo(np.array(pixels), suffix, metadata, chunks, tags, source, warnings)


def _sixteen_bits(image: Image.Image, content: bytes) -> Union[np.ndarray, str, None]:
    """16-bit colours, which Pillow does not read: the pixels, or why they are not to be had; None for others."""
    if image.format == 'PNG' and content[:8] == _PNG_SIGNATURE:
        deep = content[24] == 16 and content[25] in (2, 4, 6)  # bits, colour type with more than grey
    elif image.format == 'TIFF':
        bits = getattr(image, 'tag_v2', TiffImagePlugin.ImageFileDirectory_v2()).get(258, ())
        deep = len(np.atleast_1d(bits)) > 1 and max(np.atleast_1d(bits)) == 16
    else:
        deep = False
    if not deep:
        return None
    try:
        cv2 = import_extra('cv2', 'train')
    except MissingExtraError:
        return "Only 8 of its 16 bits were used; with pip install 'vishub[train]' all are."
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        return 'Only 8 of its 16 bits were used: they are stored in a way that could not be read.'
    if pixels.ndim == 3:
        pixels = pixels[..., [2, 1, 0, 3][:pixels.shape[2]]]  # BGR(A) -> RGB(A)
    return pixels


def _png_16(pixels: np.ndarray, chunks: bytes) -> bytes:
    cv2 = import_extra('cv2', 'train')
    if pixels.shape[-1] == 2:  # grey with alpha is not known to OpenCV
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, -1), pixels[..., 1:]], -1)
    if pixels.shape[-1] >= 3:
        pixels = pixels[..., [2, 1, 0, 3][:pixels.shape[-1]]]
    done, encoded = cv2.imencode('.png', pixels)
    if not done:
        raise InputError('the picture could not be written as .png')
    content = encoded.tobytes()
    after_header = 8 + 25  # signature, IHDR
    return content[:after_header] + chunks + content[after_header:]


def _write_tiff_16(path: Path, pixels: np.ndarray, tags: Tuple[Tuple[int, int, int, Any], ...]) -> None:
    tifffile = import_extra('tifffile', 'train')
    channels = pixels.shape[-1]
    values = {code: value for code, _, _, value in tags}
    options: Dict[str, Any] = {'software': values.get(305, False)}  # False: none, and not tifffile's name
    if 282 in values and 283 in values:
        options.update(resolution=(values[282], values[283]), resolutionunit=values.get(296, 2))
    if channels > 1:
        options['planarconfig'] = 'contig'
    if channels in (2, 4):
        options['extrasamples'] = ['unassalpha']
    tifffile.imwrite(
        path, pixels[..., 0] if channels == 1 else pixels, compression='zlib', metadata=None,
        photometric='rgb' if channels >= 3 else 'minisblack',
        extratags=[(*tag, True) for tag in tags if tag[0] not in (282, 283, 296, 305)], **options)


def _tiff_tags(image: Any) -> Tuple[Tuple[Tuple[int, int, int, Any], ...], Tuple[str, ...]]:
    """What a TIFF tells besides its pixels, and a warning where some of it cannot be kept."""
    kept: List[Tuple[int, int, int, Any]] = []
    stored: Any = getattr(image, 'tag_v2', TiffImagePlugin.ImageFileDirectory_v2())
    for code in _TIFF_TAGS & set(stored):
        kind, value = stored.tagtype[code], stored[code]
        if kind == 2:  # text
            kept.append((code, kind, 0, str(value)))
        elif kind == 5:  # a fraction
            fraction = value.limit_rational(1 << 31)
            kept.append((code, kind, 1, tuple(int(part) for part in fraction)))
        elif isinstance(value, bytes):
            kept.append((code, kind, len(value), value))
        elif isinstance(value, int):
            kept.append((code, kind, 1, value))
    left_out = ('The settings of the camera (EXIF) are left out: a 16-bit TIFF is written without them.',)
    return tuple(kept), left_out if ExifTags.IFD.Exif in stored else ()


def _png_chunks(content: bytes) -> bytes:
    """The chunks of a PNG that say something else than pixels, as they are stored."""
    kept, position = [], 8
    while content[:8] == _PNG_SIGNATURE and position + 12 <= len(content):
        length, kind = struct.unpack('>I4s', content[position:position + 8])
        end = position + 12 + length
        if kind in (b'gAMA', b'cHRM', b'sRGB', b'iCCP', b'pHYs', b'eXIf', b'tEXt', b'zTXt', b'iTXt', b'tIME'):
            kept.append(content[position:end])
        position = end
    return b''.join(kept)


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint16:
        pixels = np.round(pixels / np.float32(257)).astype(np.uint8)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
