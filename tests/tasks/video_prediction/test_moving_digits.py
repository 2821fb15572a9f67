"""Moving digits: geometry, reproducibility, and digits as they are published."""
import gzip
import json
import struct

import numpy as np
import pytest

from vishub import InputError
from vishub.tasks.video_prediction.moving_digits import load_digits, moving_digits, scale_digits


@pytest.fixture
def items():
    """Two items, each filled with a value of its own."""
    return np.stack([np.full((28, 28), value, np.uint8) for value in (100, 200)])


def place(frame):
    """Left and top of what is not black."""
    rows, columns = np.nonzero(frame)
    return columns.min(), rows.min()


def test_item_moves_straight_and_bounces(items):
    clip = moving_digits(items[:1], 64, 200, 1, seed=(3,))
    assert clip.shape == (200, 1, 64, 64) and clip.dtype == np.uint8
    corners = np.array([place(frame[0]) for frame in clip])
    assert corners.min() == 0 and corners.max() == 36  # the free path of 28 pixels on 64
    assert all((frame > 0).sum() == 28 * 28 for frame in clip)  # never cut off
    steps = np.abs(np.diff(corners, axis=0))
    assert steps.max() <= 4  # 0.1 of 36 pixels, at most, and what truncation adds
    turns = (np.diff(np.sign(np.diff(corners[:, 0]))) != 0).sum()
    assert turns > 5
    # away from the edges the speed is 0.1 of the free path in all: sqrt(dx**2 + dy**2) = 3.6 pixels a frame
    inside = (corners > 4).all(1) & (corners < 32).all(1)
    run = np.flatnonzero(inside[:-1] & inside[1:])
    assert np.sqrt((np.diff(corners, axis=0)[run] ** 2).sum(1)).mean() == pytest.approx(3.6, abs=0.5)


def test_overlap_shows_the_brighter(items):
    for seed in range(200):
        clip = moving_digits(items, 64, 1, 2, seed=(seed,))
        values = np.unique(clip)
        if set(values) == {0, 100, 200} and (clip == 100).sum() < 28 * 28:
            assert (clip == 200).sum() == 28 * 28
            return
    pytest.fail('no overlap in 200 clips')


def test_clips_depend_on_their_seed_alone(items):
    first = moving_digits(items, 32, 5, 2, seed=(0, 1, 2))
    assert np.array_equal(first, moving_digits(items, 32, 5, 2, seed=(0, 1, 2)))
    assert not np.array_equal(first, moving_digits(items, 32, 5, 2, seed=(0, 1, 3)))


def test_half_the_canvas_takes_the_mean_of_four_pixels():
    item = np.random.default_rng(0).integers(0, 256, (1, 28, 28)).astype(np.uint8)
    assert scale_digits(item, 64) is item
    half = scale_digits(item, 32)
    expected = item.reshape(1, 14, 2, 14, 2).mean((2, 4))
    assert half.shape == (1, 14, 14) and np.abs(half - expected).max() <= 0.51


def idx(images):
    return struct.pack('>4i', 2051, len(images), 28, 28) + images.tobytes()


def test_published_files(tmp_path):
    train = np.random.default_rng(0).integers(0, 256, (5003, 28, 28)).astype(np.uint8)
    folder = tmp_path / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    (folder / 'train-images-idx3-ubyte').write_bytes(idx(train))
    (folder / 't10k-images-idx3-ubyte.gz').write_bytes(gzip.compress(idx(train[:7])))
    digits = load_digits(tmp_path)
    assert digits.name == 'MNIST'
    assert np.array_equal(digits.train, train[:3]) and np.array_equal(digits.val, train[3:])
    assert np.array_equal(digits.test, train[:7])

    (folder / 't10k-images-idx3-ubyte.gz').write_bytes(b'no gzip')
    with pytest.raises(InputError, match='t10k-images.*no IDX file'):
        load_digits(tmp_path)
    assert load_digits(tmp_path / 'nothing') is None


def test_npm_digits_hold_out_the_last_hundred_of_each_class(tmp_path):
    for digit in range(10):
        values = [[round((digit + 1) / 10, 3)] * 784] * (101 + digit)
        (tmp_path / f'{digit}.json').write_text(json.dumps({'data': sum(values, [])}))
    digits = load_digits(tmp_path)
    assert [len(part) for part in (digits.train, digits.val, digits.test)] == [55, 500, 500]
    assert digits.test[0, 0, 0] == round(255 * 0.1) and digits.test[-1, 0, 0] == 255
    (tmp_path / '3.json').write_text('{"data": [1, 2]}')
    with pytest.raises(InputError, match='3.json'):
        load_digits(tmp_path)
