"""Every kind of picture a user may hand in is decoded rightly or refused in one sentence."""
import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from vishub.errors import InputError
from vishub.tasks.images import MAX_PIXELS, SUFFIXES, decode_image, images_in

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(width=6, height=4):
    """Left half red, right half blue."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, :width // 2, 0] = 255
    array[:, width // 2:, 2] = 255
    return Image.fromarray(array)


def content(image, format='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size, with almost nothing behind it."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b'\0' * 100)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


# -- what works -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'WEBP', 'GIF', 'PPM', 'JPEG'])
def test_formats(format, tmp_path):
    path = tmp_path / f'picture.{format.lower()}'
    options = {'lossless': True} if format == 'WEBP' else {'quality': 100, 'subsampling': 0} if format == 'JPEG' else {}
    path.write_bytes(content(picture(16, 16), format, **options))
    decoded = decode_image(path)
    assert decoded.source == str(path) and decoded.warnings == ()
    assert decoded.image.mode == 'RGB' and decoded.image.size == (16, 16)
    assert np.abs(np.asarray(decoded.image).astype(int) - np.asarray(picture(16, 16))).max() <= 3


def test_every_way_to_hand_in_the_same_pixels(tmp_path):
    array = np.array(picture())
    path = tmp_path / 'a.png'
    path.write_bytes(content(picture()))
    with open(path, 'rb') as file:
        ways = [
            path, str(path), os.fsencode(path).decode(), path.read_bytes(), io.BytesIO(path.read_bytes()), file,
            picture(), array, array.astype(np.uint16) * 257, array / 255, (array / 255).astype(np.float16),
            torch.from_numpy(array).permute(2, 0, 1), torch.from_numpy(array).permute(2, 0, 1) / 255,
            (torch.from_numpy(array).permute(2, 0, 1) / 255).bfloat16().requires_grad_(),
        ]
        for way in ways:
            assert np.array_equal(np.asarray(decode_image(way).image), array), type(way)


def test_sixteen_bit_grey_keeps_its_range():
    array = np.array([[0, 65535], [257 * 100, 257 * 200]], np.uint16)
    for image in (content(Image.fromarray(array)), content(Image.fromarray(array), 'TIFF'), Image.fromarray(array)):
        assert np.asarray(decode_image(image).image)[..., 0].tolist() == [[0, 255], [100, 200]]
    wide = Image.fromarray(array.astype(np.int32))  # mode I
    assert np.asarray(decode_image(wide).image)[..., 1].tolist() == [[0, 255], [100, 200]]


def test_cmyk_grey_palette_and_bilevel():
    assert decode_image(content(picture(16, 16).convert('CMYK'), 'JPEG', quality=100)).image.getpixel((2, 2))[0] > 240
    assert decode_image(content(Image.new('L', (3, 2), 77))).image.getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(content(picture().quantize(4))).image.getpixel((0, 0)) == RED
    assert decode_image(content(Image.new('1', (3, 2), 1))).image.getpixel((0, 0)) == WHITE


def test_transparency_is_laid_on_white():
    clear, half = Image.new('RGBA', (2, 2), (*RED, 0)), Image.new('RGBA', (2, 2), (*RED, 128))
    assert decode_image(content(clear)).image.getpixel((0, 0)) == WHITE
    assert decode_image(half).image.getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    assert decode_image(np.asarray(clear)).image.getpixel((0, 0)) == WHITE
    assert decode_image(torch.zeros(4, 2, 2)).image.getpixel((0, 0)) == WHITE
    assert decode_image(content(Image.new('LA', (2, 2), (0, 0)))).image.getpixel((0, 0)) == WHITE
    palette = picture().quantize(4)
    red = palette.getpixel((0, 0))
    decoded = decode_image(content(palette, transparency=red)).image
    assert decoded.getpixel((0, 0)) == WHITE and decoded.getpixel((5, 0)) == BLUE


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = picture(6, 4)
    upright.putpixel((0, 0), GREEN)
    stored = {  # how a camera would have to store it so that the flag makes it upright
        1: lambda im: im,
        2: lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda im: im.transpose(Image.Transpose.ROTATE_180),
        4: lambda im: im.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda im: im.transpose(Image.Transpose.TRANSPOSE),
        6: lambda im: im.transpose(Image.Transpose.ROTATE_90),
        7: lambda im: im.transpose(Image.Transpose.TRANSVERSE),
        8: lambda im: im.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = content(stored, exif=exif)
    assert np.array_equal(np.asarray(decode_image(data).image), np.asarray(upright))
    assert np.array_equal(np.asarray(decode_image(Image.open(io.BytesIO(data))).image), np.asarray(upright))


def test_broken_exif_does_not_matter():
    data = content(picture(), exif=b'Exif\0\0II*\0\xff\xff\xff\xff' + b'\xff' * 20)
    assert decode_image(data).image.size == (6, 4)


@pytest.mark.parametrize('format', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_animation_gives_its_first_frame_and_says_so(format):
    frames = [Image.new('RGB', (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {'lossless': True} if format == 'WEBP' else {}
    decoded = decode_image(content(frames[0], format, save_all=True, append_images=frames[1:], **options))
    assert decoded.image.getpixel((4, 4)) == RED
    assert len(decoded.warnings) == 1 and 'several' in decoded.warnings[0]


def test_callers_image_stays_as_it_was_and_apart():
    image = picture()
    decoded = decode_image(image).image
    image.putpixel((0, 0), GREEN)
    assert decoded.getpixel((0, 0)) == RED


def test_file_object_is_read_from_where_it_stands():
    file = io.BytesIO(b'skip' + content(picture()))
    file.seek(4)
    assert decode_image(file).image.size == (6, 4)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        dtype=st.sampled_from([np.uint8, np.uint16]),
        shape=st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
            lambda size: st.sampled_from([size, (*size, 1), (*size, 3), (*size, 4)])),
    ))
def test_any_integer_array_keeps_its_shape_and_values(array):
    eight_bits = array if array.dtype == np.uint8 else np.round(array / 257).astype(np.uint8)
    decoded = np.asarray(decode_image(array).image)
    assert decoded.shape == (*array.shape[:2], 3)
    if array.ndim == 2:
        assert (decoded == eight_bits[..., None]).all()
    elif array.shape[2] < 4:
        assert (decoded == eight_bits).all()
    else:  # on white
        alpha = eight_bits[..., 3:] / 255
        assert np.abs(decoded - (eight_bits[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    if array.dtype == np.uint8:
        tensor = torch.from_numpy(array if array.ndim == 2 else array.transpose(2, 0, 1).copy())
        assert np.array_equal(np.asarray(decode_image(tensor).image), decoded)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    shape=st.sampled_from([(3, 2), (2, 3, 3)]),
    elements=st.floats(-2, 2, width=16) | st.sampled_from([float('nan'), float('inf')]),
))
def test_any_float_array_is_scaled_or_refused(array):
    if np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1:
        decoded = np.asarray(decode_image(array).image)
        expected = array.astype(np.float64) * 255
        assert np.abs(decoded - (expected[..., None] if array.ndim == 2 else expected)).max() <= 0.501
    elif not np.isfinite(array).all() or array.min() < -0.01 or array.max() > 1.01:
        with pytest.raises(InputError):
            decode_image(array)


# -- what is refused --------------------------------------------------------------------------------------------------

def refused(image, *words):
    """The message; it must be one line with all the words."""
    with pytest.raises(InputError) as caught:
        decode_image(image)
    message = str(caught.value)
    assert '\n' not in message and all(word in message for word in words), message
    return message


def test_text_renamed_png(tmp_path):
    path = tmp_path / 'notes.png'
    path.write_text('Dear diary')
    refused(path, str(path), 'not a picture', 'give a JPEG')


def test_truncated_jpeg(tmp_path):
    path = tmp_path / 'half.jpg'
    data = content(Image.effect_noise((200, 200), 60).convert('RGB'), 'JPEG')
    path.write_bytes(data[:len(data) // 2])
    refused(path, str(path), 'damaged or incomplete', 'truncated')
    with Image.open(path) as lazy:
        refused(lazy, str(path), 'damaged or incomplete')


@pytest.mark.parametrize('format', ['PNG', 'GIF', 'WEBP', 'TIFF', 'BMP'])
def test_other_formats_cut_in_half(format, tmp_path):
    data = content(Image.effect_noise((200, 200), 60).convert('RGB'), format)
    refused(data[:len(data) // 2], 'the picture of')


def test_flipped_bytes_never_escape_as_another_error():
    rng = np.random.default_rng(0)
    for format in ('PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP'):
        original = np.frombuffer(content(Image.effect_noise((24, 24), 60).convert('RGB'), format), np.uint8)
        for _ in range(25):
            data = original.copy()
            data[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            with contextlib.suppress(InputError):
                assert decode_image(data.tobytes()).image.mode == 'RGB'


def test_empty_missing_folder_and_special_files(tmp_path):
    empty = tmp_path / 'empty.png'
    empty.touch()
    refused(empty, str(empty), '0 bytes')
    refused(b'', '0 bytes')
    refused(tmp_path / 'none.png', 'none.png', 'does not exist')
    refused(tmp_path, str(tmp_path), 'is a folder')
    refused('', 'folder')
    refused('a\0b.png', r'a\x00b.png')
    refused('a\nb.png', r'a\nb.png', 'does not exist')
    refused('x' * 5000, 'cannot be opened')
    refused('/dev/zero', 'not an ordinary file')


@pytest.mark.parametrize('url', ['https://example.org/cat.jpg', 'HTTP://x', 's3://a/cat.png', 'data:image/png;base64,'])
def test_addresses_are_not_fetched(url):
    refused(url, 'download it first')


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    path = tmp_path / 'bomb.png'
    path.write_bytes(png_header(30_000, 30_000))
    refused(path, str(path), '900,000,000 pixels', f'{MAX_PIXELS:,}', 'scale it down')
    path.write_bytes(png_header(9_000, 8_900))  # between our limit and Pillow's
    refused(path, '9,000 x 8,900')
    refused(np.broadcast_to(np.uint8(0), (30_000, 30_000)), '30,000 x 30,000')
    with pytest.raises(InputError, match='more than the 23'):
        decode_image(picture(6, 4), max_pixels=23)
    assert decode_image(picture(6, 4), max_pixels=24).image.size == (6, 4)


def test_numbers_that_are_no_picture():
    grey = np.zeros((4, 4), np.float32)
    refused(np.where(np.eye(4) > 0, np.nan, grey), 'not finite')
    refused(np.where(np.eye(4) > 0, np.inf, grey), 'not finite')
    refused(torch.full((3, 4, 4), float('nan')), 'not finite')
    refused(grey + 200, '0..1', 'divide by 255')
    refused(grey - 1, 'scale them to 0..1')
    refused(np.zeros((4, 4), np.int64), 'int64', 'uint8')
    refused(np.zeros((4, 4), bool), 'bool')
    refused(np.zeros((4, 4), complex), 'complex')
    refused(torch.zeros(3, 4, 4, dtype=torch.int64), 'int64')
    refused(torch.zeros(3, 4, 4, dtype=torch.complex64), 'plain pixel values')
    refused(Image.fromarray(grey + 5), '0..1')


@pytest.mark.parametrize('array, words', [
    (np.zeros((3, 8, 8), np.uint8), ['transpose(1, 2, 0)']),
    (np.zeros((2, 8, 8, 3), np.uint8), ['2 x 8 x 8 x 3', 'in a list']),
    (np.zeros((8, 8, 2), np.uint8), ['not a picture']),
    (np.zeros(8, np.uint8), ['not a picture']),
    (np.zeros((), np.uint8), ['no dimension']),
    (np.zeros((0, 8), np.uint8), ['at least one pixel']),
    (torch.zeros(8, 8, 3), ['C x H x W']),
    (torch.zeros(1, 3, 8, 8), ['in a list']),
    (torch.zeros(3, 0, 8), ['at least one pixel']),
])
def test_wrong_shapes(array, words):
    refused(array, *words)


def test_things_that_are_no_input(tmp_path):
    refused(None, 'NoneType')
    refused(3.5, 'float')
    refused(io.StringIO('text'), 'text, not bytes')
    path = tmp_path / 'a.png'
    path.write_bytes(content(picture()))
    with open(path) as text:
        refused(text, str(path), "open(path, 'rb')")
    file = open(path, 'rb')  # noqa: SIM115 closed on purpose
    file.close()
    refused(file, 'cannot be read')


def test_eps_is_never_handed_to_ghostscript(tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n')
    refused(path, 'not a picture')


def test_nothing_is_written(tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(content(picture()))
    before = path.stat().st_mtime_ns
    decode_image(path)
    assert [p.name for p in tmp_path.iterdir()] == ['a.png'] and path.stat().st_mtime_ns == before


# -- folders ----------------------------------------------------------------------------------------------------------

def test_images_in_folder(tmp_path):
    for name in ('b.JPG', 'a.png', 'sub/c.webp', 'notes.txt', '.hidden/d.png', '.e.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'folder.png').mkdir()
    assert images_in(tmp_path) == [tmp_path / name for name in ('a.png', 'b.JPG', 'sub/c.webp')]
    with pytest.raises(InputError, match='no pictures'):
        images_in(tmp_path / 'folder.png')
    assert all(suffix == suffix.lower() and Path(f'x{suffix}').suffix == suffix for suffix in SUFFIXES)
