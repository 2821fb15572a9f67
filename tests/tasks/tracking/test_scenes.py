"""Generated scenes: exact boxes, looks that change, the same for the same seed."""
import numpy as np
import pytest
from PIL import Image

from vishub import InputError
from vishub.tasks.tracking.data import GeneratedScenes, load_data
from vishub.tasks.tracking.scenes import NoiseTextures, PhotoTextures, Scene, find_photos


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Twelve photographs of noise, each of its own colour."""
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for number in range(12):
        values = rng.integers(0, 60, (90, 120, 3)) + [0, 8 * number, 15 * number]
        Image.fromarray(values.astype(np.uint8)).save(folder / f'{number:02d}.png')
    return folder


class Plain:
    """A black background; the target's textures are white and grey, the others' black."""

    def __init__(self):
        self.colours = iter([255, 128] + [0] * 6)

    def background(self, rng, side):
        return np.zeros((side, side, 3), np.uint8)

    def texture(self, rng):
        return np.full((32, 32, 3), next(self.colours), np.uint8)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_box_is_what_is_drawn(seed):
    # of the target alone: others may lie over it
    scene = Scene(Plain(), (seed,), length=60)
    scene._order = [0]
    for number in (0, 17, 59):
        x, y, w, h = scene.box(number)
        shown = scene.frame(number)[..., 0] > 20
        rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
        # the edge is soft, so up to a pixel and a half is missing on either side
        np.testing.assert_allclose([columns[0], rows[0]], [x, y], atol=1.6)
        np.testing.assert_allclose([columns[-1] + 1, rows[-1] + 1], [x + w, y + h], atol=1.6)


def test_looks_fade_over_eighty_frames_and_come_back():
    scene = Scene(Plain(), (0,), length=200)
    scene._order = [0]

    def middle(number):
        x, y, w, h = scene.box(number)
        return scene.frame(number)[int(y + h / 2), int(x + w / 2), 0]

    assert middle(0) == 255 and middle(80) == 128 and middle(160) == 255
    assert middle(40) == pytest.approx(191, abs=2) and middle(120) == pytest.approx(191, abs=2)


def test_targets_stay_inside_move_and_breathe(scene):
    scenes = GeneratedScenes(NoiseTextures(), 5, length=100, seed=3)
    for index in range(5):
        video = scenes.video(index)
        boxes = np.stack([video.box(number) for number in range(100)])
        centres = boxes[:, :2] + boxes[:, 2:] / 2
        assert centres.min() > 5 and centres.max() < 123
        assert np.ptp(boxes[:, 2]) >= 2
        assert np.abs(np.diff(centres, axis=0)).max() < 6
    assert boxes[:, 2:].min() >= 8 and boxes[:, 2:].max() <= 33


def test_the_same_seed_gives_the_same_scene():
    scenes = GeneratedScenes(NoiseTextures(), 4, seed=1, fade=None)
    first = scenes.video(2, epoch=0).frame(9)
    assert np.array_equal(first, scenes.video(2, epoch=0).frame(9))
    for other in (scenes.video(3, 0), scenes.video(2, 1), GeneratedScenes(NoiseTextures(), 4, seed=2).video(2, 0)):
        assert not np.array_equal(first, other.frame(9))


def test_photographs_are_split_by_file(photos, tmp_path):
    splits = find_photos(photos)
    assert [len(splits[split]) for split in ('train', 'val', 'test')] == [8, 2, 2]
    assert len({file for files in splits.values() for file in files}) == 12
    for split in ('train', 'val', 'test'):
        (tmp_path / split).mkdir()
        (tmp_path / split / f'{split}.png').write_bytes((photos / '00.png').read_bytes())
    assert find_photos(tmp_path)['test'] == [tmp_path / 'test' / 'test.png']


def test_data_from_photographs(photos):
    data = load_data(photos, num_samples=10)
    assert len(data.train) == 10 and len(data.test) == 20 and len(data.test[0]) == 100
    assert data.radius == 8 and 'no training scene has' in data.split
    files = {id(photo) for photo in data.train.textures.photos}
    assert not files & {id(photo) for photo in data.val.textures.photos}
    # backgrounds of the test split have its photographs' colour, which training has not
    bluest = max(photo[..., 2].mean() for photo in data.train.textures.photos)
    assert data.test[0]._background[..., 2].mean() > bluest


def test_data_without_photographs():
    data = load_data('noise', num_samples=6)
    assert data.tag == 'noise' and len(data.train) == 6 and data.test[0].frame(0).shape == (128, 128, 3)


def test_missing_photographs(tmp_path):
    with pytest.raises(InputError, match='does not exist'):
        load_data(tmp_path / 'nowhere')
    with pytest.raises(InputError, match='no known layout found'):
        load_data(tmp_path)
    Image.new('RGB', (50, 40)).save(tmp_path / 'one.png')
    with pytest.raises(InputError, match='three splits'):
        load_data(tmp_path)
    with pytest.raises(InputError, match='no photographs'):
        PhotoTextures([])
