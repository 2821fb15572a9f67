"""Boxes and crops: where pixels land, and back."""
import numpy as np
import pytest
from PIL import Image

from vishub import InputError
from vishub.tasks.tracking.crops import (
    as_image,
    box_in_crop,
    box_in_frame,
    check_box,
    clip_box,
    crop,
    crop_side,
    iou,
    mean_colour,
)


def test_sides_of_the_worked_example():
    assert crop_side(40, 20, 2) == 57 and crop_side(40, 20, 4) == 114


def test_crop_inside_is_the_frame_itself():
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    assert np.array_equal(crop(image, (30, 25), 10, 10, np.zeros(3)), image[20:30, 25:35])


def test_outside_is_filled():
    image = np.full((20, 20, 3), 200, np.uint8)
    out = crop(image, (0, 0), 10, 10, np.array([1., 2., 3.6]))
    assert (out[5:, 5:] == 200).all()
    assert (out[:5] == [1, 2, 4]).all() and (out[:, :5] == [1, 2, 4]).all()
    assert (crop(image, (500, -90), 10, 6, np.array([7, 8, 9])) == [7, 8, 9]).all()


@pytest.mark.parametrize('centre, side', [((30.2, 41.9), 33), ((3., 90.), 50)])
def test_a_drawn_box_lies_where_the_crop_says(centre, side):
    image = np.zeros((100, 100, 3), np.uint8)
    image[35:45, 20:36] = 255  # x, y, w, h = 20, 35, 16, 10
    box = np.array([20., 35., 16., 10.])
    where = box_in_crop(box, centre, side)
    np.testing.assert_allclose(box_in_frame(where, centre, side), box, atol=1e-4)
    out = crop(image, centre, side, 4 * side, np.zeros(3))[..., 0] > 127
    rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
    if len(rows):
        cx, cy, w, h = where * 4 * side
        low, high = np.maximum([cx - w / 2, cy - h / 2], 0), np.minimum([cx + w / 2, cy + h / 2], 4 * side)
        np.testing.assert_allclose([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], [*low, *high], atol=2)


def test_a_huge_target_in_a_4k_frame_is_cut_in_bounded_memory():
    import tracemalloc

    image = np.zeros((2160, 3840, 3), np.uint8)
    image[:, 1920:] = 255
    tracemalloc.start()
    out = crop(image, (1920, 1080), 4 * 2880, 96, np.array([9., 9., 9.]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80e6  # the square itself would have 400 MB
    assert out[48, 46, 0] == 0 and out[48, 50, 0] == 255 and out[10, 48, 0] == 9


def test_clipping_of_boxes():
    np.testing.assert_allclose(clip_box(np.array([95., 40., 30., 4.]), 100, 80, 10), [85, 37, 30, 10])
    np.testing.assert_allclose(clip_box(np.array([-50., -50., 500., 500.]), 100, 80, 10), [50, 40, 100, 80])
    # a frame smaller than the least size
    np.testing.assert_allclose(clip_box(np.array([1., 1., 2., 2.]), 6, 5, 10)[2:], [6, 5])


def test_overlap():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 0, 0], [np.nan] * 4])
    others = np.array([[5, 0, 10, 10], [20, 0, 3, 3], [0, 0, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_allclose(iou(boxes, others), [1 / 3, 0, 0, np.nan])


def test_mean_colour_of_large_frames():
    image = np.zeros((600, 600, 3), np.uint8)
    image[:, 300:] = 100
    np.testing.assert_allclose(mean_colour(image), 50)


def test_frames_of_every_good_kind():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (as_image(grey) == grey[..., None]).all() and as_image(grey).shape == (3, 4, 3)
    assert as_image(Image.new('RGB', (4, 3), (1, 2, 3)))[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize('image, sentence', [
    (np.zeros((3, 4, 4), np.uint8), 'shape 3 x 4 x 4'),
    (np.zeros((3, 4, 3), np.float32), 'float32'),
    (np.zeros((0, 4, 3), np.uint8), 'no pixels'),
    (np.zeros(5, np.uint8), 'shape 5'),
    (Image.new('RGBA', (4, 3)), 'shape 3 x 4 x 4'),
    ('frame.png', 'cannot track in a str'),
])
def test_bad_frames(image, sentence):
    with pytest.raises(InputError, match=sentence):
        as_image(image)


@pytest.mark.parametrize('box, sentence', [
    ((1, 2, 3), 'must be x, y, w, h with positive size'),
    ((1, 2, 0, 3), 'must be x, y, w, h with positive size'),
    ((1, 2, 3, float('nan')), 'must be x, y, w, h with positive size'),
    ('here', 'must be x, y, w, h with positive size'),
    (None, 'must be x, y, w, h with positive size'),
    ((1, 1, 0.5, 0.5), 'smaller than one pixel'),
    ((100, 1, 5, 5), 'outside the frame of 100 x 80'),
    ((-5, 1, 5, 5), 'outside the frame of 100 x 80'),
])
def test_bad_boxes(box, sentence):
    with pytest.raises(InputError, match=sentence):
        check_box(box, 100, 80)
