"""Camera shakes, what they do to light, and the folder layouts."""
import numpy as np
import pytest
import torch
from PIL import Image

from vishub import InputError
from vishub.tasks.deblurring.data import Pairs, Photos, TrainingCrops, load_data
from vishub.tasks.deblurring.shake import blur, camera_shake, from_linear, to_linear


def picture(height=60, width=80, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_shakes():
    rng, kernels = np.random.default_rng(0), []
    for length in (0, 0.5, 5, 9.3, 17, 31):
        for _ in range(5):
            kernel = camera_shake(rng, length)
            side = len(kernel)
            assert kernel.shape == (side, side) and side % 2 and side >= 3 and kernel.min() >= 0
            assert kernel.sum() == pytest.approx(1, abs=1e-5)
            box = np.ptp(np.argwhere(kernel > 0), axis=0).max() + 1
            assert length <= box <= length + 3
            middle = [(kernel.sum(1 - axis) * np.arange(side)).sum() - side // 2 for axis in (0, 1)]
            assert np.abs(middle).max() < 0.5
            kernels.append(kernel)
    assert np.array_equal(camera_shake(np.random.default_rng(3), 9), camera_shake(np.random.default_rng(3), 9))
    assert not np.array_equal(kernels[-1], kernels[-2])


def test_blur_adds_up_light():
    """White and black, half and half, become half the light, which is 188 in sRGB, not 128."""
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, ::2] = 255
    kernel = np.full((1, 2), 0.5, np.float32)
    assert set(np.unique(blur(image, kernel))) == {188}
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(np.round(from_linear(to_linear(values)) * 255), values)
    np.testing.assert_allclose(to_linear(values / np.float32(255)), to_linear(values), atol=1e-6)


def test_blur_is_a_convolution():
    image = np.zeros((21, 21, 3), np.uint8)
    image[10, 10] = 255
    kernel = camera_shake(np.random.default_rng(1), 7)
    light = to_linear(blur(image, kernel))[..., 0]
    radius = len(kernel) // 2
    part = light[10 - radius:11 + radius, 10 - radius:11 + radius]
    np.testing.assert_allclose(part, kernel, atol=6e-3)  # 8 bits
    assert light.sum() == pytest.approx(part.sum())
    noisy = blur(picture(), kernel, 0.02, np.random.default_rng(0)).astype(float) - blur(picture(), kernel)
    assert 0.015 < noisy.std() / 255 < 0.025


def test_layouts(tmp_path):
    one = picture()
    for split, scenes in (('train', 20), ('test', 2)):
        for scene in range(scenes):
            write(tmp_path / f'gopro/{split}/S{scene:02}/sharp/0.png', one)
            write(tmp_path / f'gopro/{split}/S{scene:02}/{"blur_gamma" if scene == 1 else "blur"}/0.png', one)
    gopro = load_data(tmp_path / 'gopro')
    assert (gopro.name, len(gopro.train), len(gopro.val), len(gopro.test)) == ('GoPro', 19, 1, 2)
    assert not gopro.synthetic and gopro.train.paths[1][0].parent.name == 'blur_gamma'

    for name in ('GT/a.png', 'GT/b.png', 'train/a.png', 'test/test-close-ups/b.png'):
        write(tmp_path / 'hide' / name, one)
    hide = load_data(tmp_path / 'hide')
    assert (hide.name, len(hide.train), hide.val, len(hide.test)) == ('HIDE', 1, None, 1)
    assert hide.test.paths[0][1] == tmp_path / 'hide/GT/b.png'

    for name in ('scene1/gt/gt_1.png', 'scene1/blur/blur_1.png'):
        write(tmp_path / 'real' / name, one)
    line = 'scene1/gt/gt_1.png scene1/blur/blur_1.png\n'
    (tmp_path / 'real/RealBlur_J_test_list.txt').write_text(line)
    real = load_data(tmp_path / 'real')
    assert (real.name, real.tag, real.train, len(real.test)) == ('RealBlur-J', 'realblur_j', None, 1)
    assert real.test.paths[0] == (tmp_path / 'real/scene1/blur/blur_1.png', tmp_path / 'real/scene1/gt/gt_1.png')
    sample = real.test.sample(0)
    assert sample.kernel is None and sample.blurred.shape == (56, 80, 3)

    for split, count in (('train', 3), ('val', 2), ('test', 1)):
        for number in range(count):
            write(tmp_path / f'bsds500/{split}/{number}.png', one)
    photos = load_data(tmp_path / 'bsds500')
    assert [len(split) for split in (photos.train, photos.val, photos.test)] == [3, 2, 1] and photos.synthetic
    assert photos.name == 'BSDS500 with synthetic camera shake' and 'research' in photos.note

    for number in range(20):
        write(tmp_path / f'flat/{number:02}.png', one)
    flat = load_data(tmp_path / 'flat')
    splits = [set(split.paths) for split in (flat.train, flat.val, flat.test)]
    assert [len(split) for split in splits] == [16, 2, 2] and len(set.union(*splits)) == 20


@pytest.mark.parametrize('files, message', [
    ((), 'holds no pictures'),
    (('train/s/sharp/0.png',), "has no folder 'blur' beside 'sharp'"),
    (('train/s/sharp/0.png', 'train/s/blur/1.png'), 'has no blurred picture'),
    (('GT/a.png', 'train/b.png'), 'has no sharp picture'),
    (('RealBlur_J_test_list.txt',), "line 1 names '.*', which does not exist"),
])
def test_bad_layouts(tmp_path, files, message):
    for name in files:
        if name.endswith('.txt'):
            (tmp_path / name).write_text('a.png b.png\n')
        else:
            write(tmp_path / name, picture())
    with pytest.raises(InputError, match=message):
        load_data(tmp_path)
    with pytest.raises(InputError, match='is not a folder'):
        load_data(tmp_path / 'nowhere')


def test_training_crops(tmp_path):
    """Crops depend on their key alone; pairs move together; blur keeps the place of what it blurs."""
    write(tmp_path / 'a.png', picture(70, 90))
    write(tmp_path / 'small.png', picture(20, 30))
    photos = TrainingCrops(Photos(sorted(tmp_path.iterdir()), (1, 1), noise=0.), crops=3, seed=1)
    assert len(photos) == 6
    sample = photos[2, 0, 32]
    assert sample['blurred'].shape == sample['sharp'].shape == (3, 32, 32) and sample['sharp'].dtype == torch.uint8
    assert (sample['blurred'].int() - sample['sharp'].int()).abs().float().mean() < 12  # a shake of one pixel
    again = TrainingCrops(Photos(sorted(tmp_path.iterdir()), (1, 1), noise=0.), crops=3, seed=1)[2, 0, 32]
    assert all(torch.equal(sample[name], again[name]) for name in sample)
    assert not torch.equal(photos[3, 0, 32]['sharp'], sample['sharp'])
    assert not torch.equal(photos[2, 2, 32]['sharp'], sample['sharp'])  # another crop of the same picture
    assert photos[0, 1, 64]['sharp'].shape == (3, 64, 64)  # mirrored where it is too small

    pairs = TrainingCrops(Pairs([(tmp_path / 'a.png', tmp_path / 'a.png')]))
    for epoch in range(8):
        pair = pairs[epoch, 0, 32]
        assert torch.equal(pair['blurred'], pair['sharp'])
    with pytest.raises(InputError, match='pairs must have one size'):
        Pairs([(tmp_path / 'a.png', tmp_path / 'small.png')]).pair(0)


def test_evaluation_samples(tmp_path):
    write(tmp_path / 'a.png', picture(70, 90))
    photos = Photos([tmp_path / 'a.png'] * 5)
    sample = photos.sample(0, 32)
    assert sample.sharp.shape == sample.blurred.shape == (32, 32, 3) and sample.kernel.sum() == pytest.approx(1)
    assert np.array_equal(sample.sharp, np.asarray(Image.open(tmp_path / 'a.png'))[19:51, 29:61])
    assert np.array_equal(photos.sample(0, 32).blurred, sample.blurred)
    assert not np.array_equal(photos.sample(0, 32, seed=1).kernel, sample.kernel)
    assert photos.sample(0).sharp.shape == (64, 88, 3) and len(photos.take(2)) == 2
