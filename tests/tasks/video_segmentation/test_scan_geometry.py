"""Scan conversions: as the official ones, and ours that undo each other; phantoms in both geometries."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.models.official_weights import GOLDEN
from vishub import InputError
from vishub.tasks.video_segmentation.geometry import (
    Sector,
    convex_to_linear,
    find_convex_scan,
    find_sector,
    linear_to_convex,
    random_sectors,
    to_linear,
    to_sector,
)
from vishub.tasks.video_segmentation.phantoms import SECTOR, as_sector, phantom


def golden(name):
    meta = json.loads((GOLDEN / 'astr' / f'asma_{name}.json').read_text())
    recipe = meta['inputs']['image']
    noise = np.random.Generator(np.random.PCG64(recipe['seed'])).standard_normal(recipe['shape'], dtype=np.float32)
    with np.load(GOLDEN / 'astr' / f'asma_{name}.npz') as arrays:
        expected = arrays['converted'].ravel()
    return meta, np.clip(np.round(128 + 50 * noise), 1, 255).astype(np.uint8), expected


def fan(image):
    """Zero outside of a fan with its apex at the top centre."""
    y, x = np.mgrid[:image.shape[0], :image.shape[1]]
    radius, angle = np.hypot(x - image.shape[1] // 2, y), np.degrees(np.arctan2(x - image.shape[1] // 2, y))
    image[~((radius >= 14) & (radius <= 70) & (abs(angle) <= 60))] = 0
    return image


# As the official code does it

def test_linear_to_convex_is_the_official_one():
    meta, image, expected = golden('linear_to_convex_48x64')
    converted = linear_to_convex(image, **meta['meta']['arguments'])
    assert list(converted.shape) == meta['outputs']['converted']['shape'] and converted.dtype == np.uint8
    assert np.array_equal(converted.ravel()[::meta['outputs']['converted']['stride']], expected)


def test_convex_to_linear_is_the_official_one():
    meta, image, expected = golden('convex_to_linear_72x120')
    image = fan(image)
    assert find_convex_scan(image)._asdict() == meta['meta']['returned']
    converted = convex_to_linear(image)
    assert list(converted.shape) == meta['outputs']['converted']['shape']
    assert np.array_equal(converted.ravel(), expected)
    # a mask goes the way that was found on its image, whatever is in it
    mask = np.zeros_like(image)
    mask[30:40, 50:70] = 255
    assert convex_to_linear(mask, find_convex_scan(image)).shape == converted.shape


def test_official_depth_order_and_large_angles():
    image = np.full((20, 30, 3), 40, np.uint8)
    image[0] = 250  # the near field
    official, top = linear_to_convex(image, 90, 10, 20), linear_to_convex(image, 90, 10, 20, top=True)
    for converted, radius in ((official, 29), (top, 10)):
        y, x = np.nonzero(converted[..., 0] == 250)
        middle = converted.shape[0] // 2
        assert np.abs(np.hypot(y - middle, x - middle) - radius).max() < 2
    assert linear_to_convex(image, 270, 10, 20).shape[0] < 59


@pytest.mark.parametrize('call, message', [
    (lambda: linear_to_convex(np.zeros((8, 8), np.uint8)), 'H x W x 3'),
    (lambda: linear_to_convex(np.zeros((8, 8, 3), np.float32)), 'uint8'),
    (lambda: linear_to_convex(np.ones((8, 8, 3), np.uint8), angle=360), 'below 360'),
    (lambda: convex_to_linear(np.zeros((8, 8, 3), np.uint8)), 'centre column'),
    (lambda: find_sector(np.zeros((8, 8, 3), np.uint8)), 'centre column'),
    (lambda: to_sector(torch.zeros(1, 1, 8, 8), Sector(200., 0.2)), 'at most 180'),
    (lambda: to_sector(torch.zeros(1, 1, 8, 8), SECTOR, near_field='left'), 'apex or outer'),
])
def test_what_cannot_be_converted(call, message):
    with pytest.raises(InputError, match=message):
        call()


# Ours

@pytest.mark.parametrize('near_field', ['apex', 'outer'])
def test_there_and_back(near_field):
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(3, 2, 5, 5), (96, 96), mode='bicubic', align_corners=True)
    sectors = Sector(torch.tensor([60., 120., 170.]), torch.tensor([0.5, 0.2, 0.15]))
    there = to_sector(smooth, sectors, near_field=near_field, size=(256, 256))
    back = to_linear(there, sectors, near_field=near_field, size=(96, 96))
    torch.testing.assert_close(back[..., 2:-2, 2:-2], smooth[..., 2:-2, 2:-2], rtol=0, atol=0.02)
    again = to_sector(back, sectors, near_field=near_field, size=(256, 256))
    inside = to_sector(torch.ones_like(smooth), sectors, size=(256, 256)) > 0
    eroded = F.max_pool2d(1 - inside.float(), 13, 1, 6) == 0
    torch.testing.assert_close(again[eroded], there[eroded], rtol=0, atol=0.03)


def test_near_field_lies_at_the_apex():
    linear = torch.zeros(1, 1, 64, 64)
    linear[:, :, :8] = 1
    linear[:, :, 40:, :8] = 2  # deep and to the left
    sector = to_sector(linear, SECTOR, 'nearest')[0, 0]
    rows, columns = torch.nonzero(sector == 1, as_tuple=True)
    assert rows.max() < 24 and abs(columns.float().mean() - 31.5) < 0.5
    rows, columns = torch.nonzero(sector == 2, as_tuple=True)
    assert columns.max() < 32  # left stays left
    outer = to_sector(linear, SECTOR, 'nearest', near_field='outer')[0, 0]
    assert torch.nonzero(outer == 1)[:, 0].max() > 55


def test_masks_stay_masks():
    mask = (torch.rand(1, 1, 48, 48) > 0.5).float()
    assert set(to_sector(mask, SECTOR, 'nearest').unique().tolist()) == {0., 1.}


def test_sector_is_found_on_a_picture():
    for angle, r0 in ((100., 0.3), (150., 0.2)):
        height, half = 150 * (1 + r0), 150 * (1 + r0) * np.sin(np.radians(angle / 2))  # 150 pixels a unit, both ways
        size = (round(height), 2 * round(half) + 1)
        lit = to_sector(torch.ones(1, 1, 64, 64), Sector(angle, r0), size=size)[0, 0].numpy() > 0
        image = np.repeat(lit[..., None].astype(np.uint8) * 90, 3, axis=2)
        image = np.pad(image, ((0, 20), (30, 30), (0, 0)))  # the picture is larger than the sector
        sector, (left, top, right, bottom) = find_sector(image)
        assert abs(float(sector.angle) - angle) < 1.5 and abs(float(sector.r0) - r0) < 0.02
        assert top == 0 and abs(bottom - height) <= 2 and abs(left - 30) <= 3 and abs(right - 31 - 2 * half) <= 3


def test_random_sectors():
    torch.manual_seed(0)
    angle, r0 = random_sectors(200)
    assert 120 <= angle.min() < 125 and 165 < angle.max() <= 170
    assert 0.15 <= r0.min() < 0.17 and 0.28 < r0.max() <= 0.3


# Phantoms

def test_phantoms_are_functions_of_their_seed():
    one, same, other = phantom((1, 2), 4), phantom((1, 2), 4), phantom((1, 3), 4)
    assert np.array_equal(one.frames, same.frames) and np.array_equal(one.masks, same.masks)
    assert not np.array_equal(one.frames, other.frames)
    assert one.frames.shape == one.masks.shape == (4, 64, 64) and one.frames.min() >= 1
    assert phantom(1, 2, side=96).frames.shape == (2, 96, 96)


def test_lesions_are_dark_and_move_and_some_last_frames_hide_them():
    hidden = shown = 0
    for seed in range(40):
        clip = phantom((5, seed), 6)
        ratio = [frame[mask].mean() / frame[ring(mask)].mean() for frame, mask in zip(clip.frames, clip.masks)]
        assert max(ratio[:-1]) < 0.9  # echoes of layers and shadows are in it
        hidden += ratio[-1] > 1.25 * np.mean(ratio[:-1])
        shown += ratio[-1] <= 1.25 * np.mean(ratio[:-1])
        assert (clip.masks.sum((1, 2)) > 40).all()
        assert (clip.masks[0] != clip.masks[-1]).any()
    assert hidden >= 9 and shown >= 16
    assert all(phantom(seed, 60).masks.any((1, 2)).all() for seed in range(10))  # long clips keep it in sight


def ring(mask):
    wide = F.max_pool2d(torch.from_numpy(mask)[None].float(), 9, 1, 4)[0].numpy() > 0
    return wide & ~mask


def test_sector_phantoms():
    clip = phantom((0, 1), 3)
    sector = as_sector(clip)
    outside = to_sector(torch.ones(1, 1, 64, 64), SECTOR)[0, 0].numpy() == 0
    assert (sector.frames[:, outside] == 0).all() and not sector.masks[:, outside].any()
    assert (sector.frames[:, ~outside] > 0).mean() > 0.99
    inside = sector.frames[0][sector.masks[0]].mean()
    assert inside < sector.frames[0][ring(sector.masks[0]) & ~outside].mean()
