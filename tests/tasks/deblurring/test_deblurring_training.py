"""Losses, a short run from the command to a folder of weights, and the figures beside them."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vishub import InputError
from vishub.models.deeprftv2 import DeblurOutput, half_size
from vishub.tasks.deblurring.data import load_data
from vishub.tasks.deblurring.metrics import evaluate, figures, peers_of, save_evaluation, update_card
from vishub.tasks.deblurring.training import DeblurringRecipe, deblurring_loss, fourier_distance

SMALL = dict(depths=(1, 1, 1), num_columns=1, dim=8, kernel_dim=8)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2), ('test', 2)):
        (tmp_path / 'photos' / split).mkdir(parents=True)
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            coarse.resize((72, 64), Image.Resampling.NEAREST).save(tmp_path / f'photos/{split}/{number}.png')
    return tmp_path / 'photos'


def test_loss_by_its_definition():
    torch.manual_seed(0)
    sharp = torch.rand(2, 3, 16, 24)
    full, half = torch.rand(4, 2, 3, 16, 24), torch.rand(4, 2, 3, 8, 12)
    expected = 0.
    for predictions, target in ((full, sharp), (half, half_size(sharp))):
        l1 = sum((p - target).abs().mean() for p in predictions) / 4
        fourier = sum((torch.fft.rfft2(p) - torch.fft.rfft2(target)).abs().mean() for p in predictions) / 4
        expected = expected + l1 + 0.01 * fourier
    torch.testing.assert_close(deblurring_loss(DeblurOutput(list(full), list(half)), sharp), expected)
    plain = deblurring_loss(DeblurOutput(list(full), list(half)), sharp, fourier_weight=0.)
    torch.testing.assert_close(plain, sum(F.l1_loss(p, sharp) for p in full) / 4
                               + sum(F.l1_loss(p, half_size(sharp)) for p in half) / 4)
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[..., 3, 4] = 1
    assert fourier_distance(impulse, torch.zeros_like(impulse)) == pytest.approx(1)  # a flat spectrum


def test_figures():
    torch.manual_seed(0)
    sharp = np.full((32, 32, 3), 100, np.uint8)
    sharp[::4] = 180
    off = sharp + 10
    measured = figures(off, sharp)
    assert measured['psnr'] == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)
    assert 0.5 < measured['ssim'] < 1 and figures(sharp, sharp)['ssim'] == pytest.approx(1)


def test_train_and_evaluate(photos, tmp_path, monkeypatch):
    """A few steps through the command; the folder it leaves can be evaluated, and its card written anew."""
    from typer.testing import CliRunner

    from vishub.cli import app
    arguments = [
        'train', 'deblurring', '--model', 'deeprftv2_tiny', '--data', str(photos), '--output', str(tmp_path / 'run'),
        '--resolution', '24:2', '--batch-size', '2', '--crops', '1', '--clip-grad', '1', '--device', 'cpu',
        '--no-progress', '--reversible', '--ema-decay', '0']
    for name, value in SMALL.items():
        arguments += ['--model-arg', f'{name}={value}']
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    folder = tmp_path / 'run/deeprftv2_tiny.photos'
    log = (tmp_path / 'run/log.csv').read_text()
    assert 'psnr' in log and 'psnr_gain' in log and (tmp_path / 'run/augmentation.png').exists()
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['split'] == 'test split' and metrics['num_test'] == 2
    assert {'psnr', 'psnr_gain', 'ssim'} <= metrics['metrics'].keys() and (folder / 'samples.png').exists()
    assert [peer['name'] for peer in metrics['peers']][:2] == ['the blurred picture', 'unsharp mask']
    assert str(tmp_path) not in (folder / 'README.md').read_text().replace(metrics['training']['command'], '')

    calls = []
    report = evaluate([str(folder)], photos, limit=1, progress=lambda *count: calls.append(count))
    assert report['num_test'] == 1 and calls[-1][0] == calls[-1][1]
    assert report['peers'][0]['metrics']['psnr_gain'] == 0
    row, = report['report']['pictures']
    assert report['metrics']['psnr_gain'] == pytest.approx(row['psnr'] - row['blurred'], abs=2e-3)
    save_evaluation(report, tmp_path / 'evaluation')
    assert (tmp_path / 'evaluation/gain.png').exists()
    update_card(folder, report)
    assert json.loads((folder / 'metrics.json').read_text())['num_test'] == 1
    with pytest.raises(InputError, match='figures on other belong elsewhere'):
        update_card(folder, {**report, 'data': 'other'})


def test_classical_methods(photos, monkeypatch):
    data = load_data(photos)
    assert 'unsharp mask' in peers_of(data)
    sample = data.test.sample(0, 64)
    for method, settings in peers_of(data).values():
        result = method(sample, settings[0])
        assert result.shape == sample.sharp.shape and result.dtype == np.uint8
        assert figures(result, sample.sharp)['psnr'] > 10


def test_bad_recipes(photos, tmp_path):
    with pytest.raises(InputError, match='is for classification, not for deblurring'):
        DeblurringRecipe('favit_b2', photos)
    with pytest.raises(InputError, match='refuses its arguments'):
        DeblurringRecipe('deeprftv2_tiny', photos, model_args={'num_columns': 0}).build_model()
    (tmp_path / 'some/test').mkdir(parents=True)
    Image.new('RGB', (40, 40)).save(tmp_path / 'some/test/a.png')
    with pytest.raises(InputError, match='has no training split'):
        DeblurringRecipe('deeprftv2_tiny', tmp_path / 'some')
