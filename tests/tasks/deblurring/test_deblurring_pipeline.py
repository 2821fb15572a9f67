"""Photographs of every kind through the pipeline, with a model whose answer is known, and with the tiny one."""
import json

import cv2
import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from torch import nn

import vishub
from vishub import InputError
from vishub.tasks.deblurring.pipeline import DeblurringPipeline, blur_between
from vishub.tasks.deblurring.shake import blur, camera_shake


class Darken(nn.Module):
    """Half as bright: what a tile's result must be is known at every pixel."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape))
        return x / 2


@pytest.fixture
def pipe():
    return DeblurringPipeline(Darken(), 'cpu')


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.mark.parametrize('size', [(1, 1), (3, 50), (24, 24), (37, 41), (150, 97), (129, 260)])
def test_any_size(pipe, size):
    image = noise(*size, 3)
    result = pipe(image, tile_size=64, tile_overlap=16)
    assert result.pixels.shape == image.shape and result.pixels.dtype == np.uint8
    np.testing.assert_allclose(result.pixels, image / 2, atol=0.51)
    for _, channels, height, width in pipe.model.sizes:
        assert channels == 3 and height % 8 == width % 8 == 0 and 24 <= min(height, width) <= max(height, width) <= 64


@pytest.mark.parametrize('shape, dtype', [
    ((40, 50), np.uint8), ((40, 50, 1), np.uint8), ((40, 50, 4), np.uint8), ((40, 50, 3), np.uint16),
    ((40, 50), np.uint16), ((40, 50, 4), np.uint16)])
def test_kinds_of_arrays(pipe, shape, dtype):
    image = noise(*shape, dtype=dtype)
    result = pipe(image)
    assert result.pixels.dtype == dtype
    expected = image[..., None] if image.ndim == 2 else image
    colours = min(expected.shape[-1], 3)
    np.testing.assert_allclose(result.pixels[..., :colours], expected[..., :colours] / 2, atol=0.6)
    np.testing.assert_array_equal(result.pixels[..., colours:], expected[..., colours:])  # alpha


def test_floats_and_tensors_keep_16_bits(pipe):
    image = np.random.default_rng(0).random((30, 40, 3)).astype(np.float32)
    for given in (image, torch.from_numpy(image).permute(2, 0, 1)):
        result = pipe(given)
        np.testing.assert_allclose(result.pixels / 65535, image / 2, atol=2e-5)


@pytest.mark.parametrize('mode, suffix', [
    ('L', '.png'), ('LA', '.png'), ('RGB', '.jpg'), ('RGB', '.webp'), ('RGBA', '.png'), ('RGBA', '.webp'),
    ('RGB', '.tif'), ('RGB', '.bmp')])
def test_files_keep_their_kind(pipe, tmp_path, mode, suffix):
    path = tmp_path / f'a{suffix}'
    Image.fromarray(noise(40, 56, 3)).convert(mode).save(path)
    result = pipe(path)
    assert result.suffixes == (suffix, '.json')
    saved = result.save(tmp_path / f'sharp{suffix}')
    with Image.open(saved) as image, Image.open(path) as given:
        assert (image.mode, image.size, image.format) == (given.mode, given.size, given.format)
    assert not result.warnings


def test_palette_and_cmyk(pipe, tmp_path):
    Image.fromarray(noise(40, 56, 3)).convert('P').save(tmp_path / 'p.png')
    Image.fromarray(noise(40, 56, 3)).convert('CMYK').save(tmp_path / 'c.jpg')
    for name, word in (('p.png', 'palette'), ('c.jpg', 'CMYK')):
        result = pipe(tmp_path / name)
        assert word in result.warnings[0]
        with Image.open(result.save(tmp_path / f'sharp{name}')) as image:
            assert image.mode == 'RGB'


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_16_bit_files(pipe, tmp_path, suffix, channels):
    image = noise(40, 56, channels, dtype=np.uint16)
    stored = image[..., 0] if channels == 1 else image[..., [2, 1, 0, 3][:channels]]
    cv2.imwrite(str(tmp_path / f'a{suffix}'), stored)
    result = pipe(tmp_path / f'a{suffix}')
    assert result.pixels.dtype == np.uint16 and not result.warnings
    np.testing.assert_allclose(result.pixels[..., :3], image[..., :3] / 2, atol=0.6)
    again = cv2.imread(str(result.save(tmp_path / f'sharp{suffix}')), cv2.IMREAD_UNCHANGED)
    assert again.dtype == np.uint16
    np.testing.assert_array_equal(again if channels == 1 else again[..., [2, 1, 0, 3][:channels]],
                                  result.pixels[..., 0] if channels == 1 else result.pixels)


def test_16_bit_colour_keeps_text(pipe, tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), noise(40, 56, 3, dtype=np.uint16))
    from vishub.tasks.deblurring.photo import read_photo
    info = PngInfo()
    info.add_text('Author', 'someone')
    Image.new('RGB', (8, 8)).save(tmp_path / 'text.png', pnginfo=info)
    chunks = read_photo(tmp_path / 'text.png').chunks
    assert b'tEXt' in chunks
    content = (tmp_path / 'a.png').read_bytes()
    (tmp_path / 'b.png').write_bytes(content[:33] + chunks + content[33:])
    saved = pipe(tmp_path / 'b.png').save(tmp_path / 'sharp.png')
    with Image.open(saved) as image:
        assert image.text['Author'] == 'someone'
    assert cv2.imread(str(saved), cv2.IMREAD_UNCHANGED).dtype == np.uint16


def test_16_bit_tiff_keeps_what_is_written_beside_the_pixels(pipe, tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    tifffile.imwrite(
        tmp_path / 'a.tif', noise(40, 56, 3, dtype=np.uint16), photometric='rgb', metadata=None, iccprofile=icc,
        description='a bridge', software='a scanner', resolution=(300, 300), resolutionunit='INCH',
        extratags=[(274, 3, 1, 6, True), (272, 2, 0, 'Box', True)])
    result = pipe(tmp_path / 'a.tif')
    assert result.image.size == (40, 56)  # upright: turned by a quarter
    with Image.open(result.save(tmp_path / 'sharp.tif')) as image:
        tags = image.tag_v2
        assert (tags[270], tags[272], tags[305], tags[296]) == ('a bridge', 'Box', 'a scanner', 2)
        assert 274 not in tags and image.size == (40, 56)  # upright already
        assert tags[282] == tags[283] == 300 and image.info['icc_profile'] == icc


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp'])
def test_metadata_and_orientation_are_kept(pipe, tmp_path, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Model] = 6, 'Box'
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    path = tmp_path / f'a{suffix}'
    Image.fromarray(noise(40, 56, 3)).save(path, exif=exif, icc_profile=icc)
    result = pipe(path)
    assert result.pixels.shape == (40, 56, 3)  # as stored
    assert result.image.size == result.original.size == (40, 56)  # upright: turned by a quarter
    with Image.open(result.save(tmp_path / f'sharp{suffix}')) as image:
        assert image.size == (56, 40)
        assert image.getexif()[ExifTags.Base.Orientation] == 6 and image.getexif()[ExifTags.Base.Model] == 'Box'
        assert image.info['icc_profile'] == icc


def test_result(pipe, tmp_path):
    result = pipe(noise(40, 56, 3))
    assert json.loads(json.dumps(result.to_dict()))['tiles'] == 1
    assert result.plot().mode == 'RGB' and result.residual.size == (56, 40)
    assert json.loads(result.save(tmp_path / 'a.json').read_text())['width'] == 56
    assert '56 x 40 pixels in 1 tile' in result.summary()[0]
    half = pipe(noise(40, 56, 3), strength=0.5)
    np.testing.assert_allclose(half.pixels, noise(40, 56, 3) * 0.75, atol=0.51)
    with pytest.raises(InputError, match='give a name that ends in'):
        result.save(tmp_path / 'a.gif')
    assert not list(tmp_path.glob('*.gif'))


def test_tiles_are_the_whole_picture_tile_by_tile():
    """The half-size picture of a tile is a part of the whole one's, also at the borders of pictures of odd size."""
    torch.manual_seed(0)
    model = timm.create_model('deeprftv2_tiny', depths=(1, 1, 1), num_columns=1).eval()
    seen = {}
    forward = model.forward

    def watched(x, half=None, return_kernels=False):
        seen[tuple(x[0, :, 0, 0].tolist())] = (x, half)
        return (x, torch.zeros(1, 16, 65, 65)) if return_kernels else x
    model.forward = watched
    from vishub.models.deeprftv2 import half_size
    image = noise(60, 100, 3)
    pipe = DeblurringPipeline(model, 'cpu')
    pipe(image, tile_size=512)
    (whole, half), = seen.values()
    torch.testing.assert_close(half, half_size(whole))
    seen.clear()
    result = pipe(image, tile_size=48, tile_overlap=16)
    np.testing.assert_array_equal(result.pixels, image)
    for x, tile_half in seen.values():
        (top, left), = [(y, x0) for y in (0, 16) for x0 in (0, 32, 56)
                        if torch.equal(whole[..., y:y + 48, x0:x0 + 48], x)]
        torch.testing.assert_close(tile_half, half[..., top // 2:top // 2 + 24, left // 2:left // 2 + 24])
    assert result.kernels.shape == (16, 65, 65)
    model.forward = forward


@pytest.mark.parametrize('side, tiles', [(32, 4), (64, 1), (256, 1)])
def test_tiles_follow_the_crops_of_training(side, tiles):
    """Twice their side, a quarter of it shared: 112 pixels are two tiles of 64, or one of 112."""
    model = timm.create_model(
        'deeprftv2_tiny', depths=(1, 1, 1), num_columns=1, pretrained_cfg_overlay={'input_size': (3, side, side)})
    assert DeblurringPipeline(model, 'cpu')(noise(112, 112, 3)).num_tiles == tiles


def test_progress_list_and_cancel(pipe):
    calls = []
    pipe(noise(100, 60, 3), tile_size=64, tile_overlap=16, progress=lambda *count: calls.append(count))
    assert calls == [(0, 2), (1, 2), (2, 2)]
    results = pipe([noise(24, 24, 3)] * 2, progress=lambda *count: calls.append(count))
    assert len(results) == 2 and calls[3:] == [(0, 2), (1, 2), (2, 2)]

    def stop(done, total):
        raise RuntimeError('stopped')
    with pytest.raises(RuntimeError, match='stopped'):
        pipe(noise(24, 24, 3), progress=stop)


def test_memory_of_large_photographs(pipe):
    """Beyond the picture and its result, memory is that of a row of tiles, not of the picture."""
    import tracemalloc
    peaks = []
    for height in (512, 2048):
        image = np.zeros((height, 1024, 3), np.uint8)
        pipe.model.sizes.clear()
        tracemalloc.start()
        pipe(image, tile_size=256, tile_overlap=64)
        peaks.append(tracemalloc.get_traced_memory()[1] - 2 * image.nbytes)
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_video(pipe, tmp_path):
    path = str(tmp_path / 'a.mp4')
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*'mp4v'), 10, (64, 48))
    for level in (100, 150, 200):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    calls = []
    result = pipe(path, progress=lambda *count: calls.append(count))
    assert result.num_frames == 3 and result.fps == pytest.approx(10) and calls[-1] == (3, 3)
    reader = cv2.VideoCapture(str(result.save(tmp_path / 'sharp.mp4')))
    levels = []
    while (read := reader.read())[0]:
        levels.append(read[1].mean())
    np.testing.assert_allclose(levels, [50, 75, 100], atol=8)  # compressed twice
    assert json.loads(result.save(tmp_path / 'a.json').read_text())['frames'] == 3
    (tmp_path / 'broken.mp4').write_bytes(b'no video')
    for name, message in (('broken.mp4', 'is not a video'), ('nowhere.mp4', 'does not exist')):
        with pytest.raises(InputError, match=message):
            pipe(tmp_path / name)


@pytest.mark.parametrize('options, message', [
    (dict(tile_size=100), 'tile_size is 100'), (dict(tile_size=16), 'at least 24'),
    (dict(tile_overlap=12), 'tile_overlap is 12'), (dict(tile_size=64, tile_overlap=40), 'tile_overlap is 40'),
    (dict(strength=1.5), 'strength is 1.5'),
])
def test_bad_options(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe(noise(32, 32, 3), **options)


def test_bad_pictures(pipe, tmp_path):
    (tmp_path / 'empty.png').write_bytes(b'')
    (tmp_path / 'text.jpg').write_text('no picture')
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / 'cut.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'cut.jpg').read_bytes()[:600])
    nan = np.full((32, 32, 3), np.nan, np.float32)
    for image, message in (
            (tmp_path / 'empty.png', r'empty \(0 bytes\)'), (tmp_path / 'text.jpg', 'is not a picture'),
            (tmp_path / 'cut.jpg', 'damaged'), (nan, 'not finite'),
            (np.zeros((0, 5, 3), np.uint8), 'at least one pixel'),
            (np.zeros((10_000, 10_000), np.uint8), 'more than the 80,000,000'), (tmp_path, 'is a folder'),
            (3, 'from a int')):
        with pytest.raises(InputError, match=message):
            pipe(image)


def test_bytes_and_file_objects(pipe, tmp_path):
    path = tmp_path / 'a.png'
    Image.fromarray(noise(40, 56, 3)).save(path)
    with open(path, 'rb') as file:
        results = [pipe(path), pipe(path.read_bytes()), pipe(file), pipe(Image.open(path))]
    assert all(np.array_equal(result.pixels, results[0].pixels) for result in results)
    assert [result.photo.source for result in results[:3]] == [str(path), None, str(path)]
    with open(path, encoding='latin-1') as text, pytest.raises(InputError, match="open it with open"):
        pipe(text)


def test_damaged_weights(pipe):
    pipe.model.forward = lambda x: x * float('nan')
    with pytest.raises(InputError, match='its weights are damaged'):
        pipe(noise(24, 24, 3))


def test_estimated_blur_is_the_blur():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sharp = np.asarray(coarse.resize((200, 160), Image.Resampling.NEAREST))
    kernel = camera_shake(rng, 11)
    found = blur_between(sharp, blur(sharp, kernel, 0.002, rng))
    expected = np.zeros((33, 33))
    side = len(kernel)
    expected[16 - side // 2:17 + side // 2, 16 - side // 2:17 + side // 2] = kernel
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95
    point = blur_between(np.full((30, 30, 3), 99, np.uint8), np.full((30, 30, 3), 99, np.uint8))
    assert point[16, 16] == 1 == point.sum()


def test_through_the_public_name():
    model = timm.create_model('deeprftv2_tiny', depths=(1, 1, 1), num_columns=1)
    pipe = vishub.pipeline('deblurring', model, device='cpu')
    result = pipe(noise(30, 27, 3))
    assert isinstance(pipe, DeblurringPipeline) and pipe.name == 'deeprftv2_tiny'
    assert result.kernels.shape == (16, 31, 31) and np.isfinite(result.kernels).all()
