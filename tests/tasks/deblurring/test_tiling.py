"""Tiles against the official code's, and their weights."""
import numpy as np
import pytest

from tests.models.official_weights import load_case
from vishub.tasks.deblurring.tiling import mirrored, run_tiles, tile_weights, tiles_of


def merged(picture, tile, overlap, change=lambda part, number: part):
    """(H, W, C) through tiles: each one's pixels changed, and put together; also the tiles themselves."""
    parts, out = [], np.full(picture.shape, np.nan, np.float32)

    def run(top, left, height, width):
        part = picture[top:top + height, left:left + width]
        parts.append(part)
        return change(part, len(parts) - 1)

    def write(top, rows):
        assert np.isnan(out[top:top + len(rows)]).all(), 'rows are written once'
        out[top:top + len(rows)] = rows

    assert run_tiles(picture.shape[:2], tile, overlap, run, write) == len(parts)
    return out, parts


def test_official_tiles():
    case = load_case('deeprftv2', 'tiling_32_ov8_1x3x72x56')
    picture = case.inputs['x'][0].permute(1, 2, 0).numpy()
    same, parts = merged(picture, 32, 8)
    import torch
    flat = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).flatten(2)[..., ::7]
    case.check('parts', flat)
    case.check('merged_identity', torch.from_numpy(same).permute(2, 0, 1)[None])
    scaled, _ = merged(picture, 32, 8, lambda part, number: part * (1 + 0.1 * number))
    case.check('merged_scaled', torch.from_numpy(scaled).permute(2, 0, 1)[None])


def test_weights_sum_to_one_at_every_size():
    """Also where three tiles overlap, for which the official weights do not."""
    for length in (*range(1, 1300, 7), 897, 900, 1023, 1281, 1407, 1700):
        starts, weights = tiles_of(length, 512, 128), tile_weights(length, 512, 128)
        total = np.zeros(length)
        for start, weight in zip(starts, weights):
            assert (weight >= 0).all() and len(weight) == min(length, 512)
            total[start:start + len(weight)] += weight
        np.testing.assert_allclose(total, 1, atol=1e-6)
        assert starts[0] == 0 and starts[-1] + len(weights[-1]) == length


def test_positions():
    assert tiles_of(720, 512, 128) == [0, 208] and tiles_of(1280, 512, 128) == [0, 384, 768]
    assert tiles_of(512, 512, 128) == [0] == tiles_of(20, 512, 128)
    for tile, overlap in ((32, 24), (0, 0), (32, -8)):
        with pytest.raises(ValueError, match='at least twice the overlap'):
            tiles_of(100, tile, overlap)


def test_mirroring():
    np.testing.assert_array_equal(mirrored(np.arange(-3, 8), 4), [3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1])
    assert not mirrored(np.arange(-2, 3), 1).any()


def test_progress_and_cancel():
    calls = []

    def progress(done, total):
        calls.append((done, total))
        if done == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_tiles((60, 60), 32, 8, lambda *region: np.zeros((32, 32, 3)), lambda *rows: None, progress)
    assert calls == [(0, 9), (1, 9), (2, 9)]
