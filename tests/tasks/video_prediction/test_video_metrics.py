"""Metrics of video prediction against the official ones, and against their definitions."""
import json
import math

import numpy as np
import pytest
import torch

from tests.models.official_weights import GOLDEN
from vishub.errors import InputError
from vishub.tasks.video_prediction.metrics import VideoMetrics, absolute_error, psnr, squared_error, ssim


@pytest.fixture(scope='module')
def golden():
    """(prediction, truth, expected figures)"""
    case = json.loads((GOLDEN / 'predformer' / 'metrics_small.json').read_text())
    rng = np.random.Generator(np.random.PCG64(case['seed']))
    true = rng.random(case['shape'], dtype=np.float32)
    pred = true + 0.15 * rng.standard_normal(case['shape'], dtype=np.float32)
    return pred, true, case['expected']


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(3, 4, 2, 11, 9, generator=generator)
    return (true + 0.2 * torch.randn(true.shape, generator=generator)), true


def test_golden(golden):
    pred, true, expected = golden
    metrics = VideoMetrics()
    metrics.update(pred, true)
    figures = metrics.compute()
    assert figures['mse'] == pytest.approx(expected['mse'], rel=1e-6)
    assert figures['mae'] == pytest.approx(expected['mae'], rel=1e-6)
    assert figures['psnr'] == pytest.approx(expected['psnr'], rel=1e-6)
    assert figures['ssim'] == pytest.approx(expected['ssim_data_range_2'], rel=1e-6)
    assert ssim(pred, true, 1.).mean().item() == pytest.approx(expected['ssim_data_range_1'], rel=1e-6)


def test_golden_weather(golden):
    pred, true, expected = golden
    expected = expected['weather']
    metrics = VideoMetrics(('mse', 'mae', 'rmse'), mean=expected['mean'], std=expected['std'], per_pixel=True)
    metrics.update(pred, true)
    figures = metrics.compute()
    for name in ('mse', 'mae', 'rmse'):
        assert figures[name] == pytest.approx(expected[name], rel=1e-6)
    assert figures['scale'] == 'mean over pixels'


def test_sums_of_a_frame():
    true = torch.zeros(1, 2, 3, 8, 8)
    pred = true.clone()
    pred[0, 1] = -0.5
    assert squared_error(pred, true).tolist() == [[0., 48.]]
    assert absolute_error(pred, true).tolist() == [[0., 96.]]
    assert psnr(pred, true).tolist() == [[math.inf, math.inf]]  # negative values are clipped
    assert psnr(pred + 0.6, true)[0, 1].item() == pytest.approx(20.)


def test_ssim_by_its_definition(clips):
    """Window by window, with numpy's own variance and covariance."""
    pred, true = (clip.double().numpy() for clip in clips)
    pred = pred.clip(0, 1)
    expected = np.zeros(pred.shape[:2])
    for b, t in np.ndindex(expected.shape):
        values = []
        for c, i, j in np.ndindex(2, 5, 3):
            x, y = (clip[b, t, c, i:i + 7, j:j + 7].ravel() for clip in (pred, true))
            cov = np.cov(x, y)
            c1, c2 = 0.02 ** 2, 0.06 ** 2
            values.append(
                (2 * x.mean() * y.mean() + c1) * (2 * cov[0, 1] + c2)
                / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
        expected[b, t] = np.mean(values)
    np.testing.assert_allclose(ssim(*clips).numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(ssim(clips[1], clips[1]), torch.ones(3, 4, dtype=torch.float64))


def test_batches_and_horizon(clips):
    pred, true = clips
    whole, parts = (VideoMetrics(VideoMetrics.NAMES) for _ in range(2))
    whole.update(pred, true)
    parts.update(pred[:1], true[:1])
    parts.update(pred[1:].numpy(), true[1:].numpy())
    expected, got = whole.compute(), parts.compute()
    assert got['num_clips'] == 3 and got['scale'] == 'sum over the pixels of a frame'
    for name in VideoMetrics.NAMES:
        assert got[name] == pytest.approx(expected[name])
        assert got['horizon'][name] == pytest.approx(expected['horizon'][name])
        assert len(got['horizon'][name]) == 4
    assert got['horizon']['mse'] == pytest.approx(squared_error(pred, true).mean(0).tolist())
    assert got['rmse'] == pytest.approx(math.sqrt(got['mse']))
    assert got['rmse'] > np.mean(got['horizon']['rmse'])  # the root of the mean is more than the mean of roots


def test_normalised_clips_are_brought_back(clips):
    pred, true = clips
    mean, std = (0.3, 0.5), (2., 0.25)
    shape = torch.tensor(mean).reshape(-1, 1, 1), torch.tensor(std).reshape(-1, 1, 1)
    plain, normalised = VideoMetrics(VideoMetrics.NAMES), VideoMetrics(VideoMetrics.NAMES, mean=mean, std=std)
    plain.update(pred, true)
    normalised.update((pred - shape[0]) / shape[1], (true - shape[0]) / shape[1])
    for name in VideoMetrics.NAMES:
        assert normalised.compute()[name] == pytest.approx(plain.compute()[name], rel=1e-5)


def test_bad_input(clips):
    pred, true = clips
    with pytest.raises(InputError, match='must be the same'):
        squared_error(pred[:, :2], true)
    with pytest.raises(InputError, match=r'\(batch, frames'):
        ssim(pred[0], true[0])
    with pytest.raises(InputError, match='prediction is torch.uint8'):
        absolute_error((pred * 255).byte(), true)
    with pytest.raises(InputError, match='at least 7 x 7 pixels, these have 11 x 6'):
        ssim(pred[..., :6], true[..., :6])
    with pytest.raises(InputError, match="'lpips'"):
        VideoMetrics(('mse', 'lpips'))
    with pytest.raises(InputError, match='std'):
        VideoMetrics(std=0.)
    with pytest.raises(InputError, match='channels'):
        VideoMetrics(mean=(0., 0., 0.)).update(pred, true)
    metrics = VideoMetrics()
    with pytest.raises(InputError, match='no clip'):
        metrics.compute()
    metrics.update(pred, true)
    with pytest.raises(InputError, match='clips of 2 frames after clips of 4'):
        metrics.update(pred[:, :2], true[:, :2])
