"""Training, its finished folder, evaluation and the card, end to end on a very small model."""
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vishub
import vishub.tasks.video_prediction.data as data_module
from vishub import InputError
from vishub.cli import app
from vishub.tasks.video_prediction.data import StoredClips, VideoData
from vishub.tasks.video_prediction.metrics import evaluate, save_evaluation, update_card
from vishub.tasks.video_prediction.training import VideoPredictionRecipe
from vishub.training import TrainConfig, train

SMALL = {'embed_dim': 16, 'num_heads': 2, 'head_dim': 8, 'n_layers': 1}


@pytest.fixture
def digits(tmp_path):
    folder = tmp_path / 'digits'
    folder.mkdir()
    for digit in range(10):
        (folder / f'{digit}.json').write_text(json.dumps({'data': [(digit + 1) / 10] * 784 * 102}))
    return folder


@pytest.fixture
def measurements():
    """32 hours of a grid around 280, on which a wave travels."""
    column = np.arange(16)
    hours = [280 + 10 * np.sin((column - hour) * np.pi / 4) for hour in range(60)]
    wave = np.repeat(np.stack(hours)[:, None, None], 8, 2).astype(np.float32)  # hours, 1, 8, 16
    return VideoData(
        name='a wave', tag='wave', train=StoredClips([wave[:40]], 8), val=StoredClips([wave[30:50]], 8),
        test=StoredClips([wave[44:]], 8), mean=(280.,), std=(7.,), metrics=('mse', 'mae', 'rmse'), per_pixel=True)


def test_recipe_normalises_and_learns_the_wave(measurements, tmp_path):
    recipe = VideoPredictionRecipe(
        'predformer_tiny', measurements, model_args={**SMALL, 'num_frames': 4})
    assert recipe.build_model().img_size == (8, 16)  # the data's
    given, future = recipe.prepare(torch.from_numpy(np.stack([measurements.train.clip(i) for i in (0, 5)])), 8, True)
    assert given.shape == future.shape == (2, 4, 1, 8, 16)
    np.testing.assert_allclose(given[1, 0].numpy() * 7 + 280, measurements.train.clip(5)[0], rtol=1e-5)

    assert recipe.preview(8).size == (8 * 18, 6 * 10)
    torch.manual_seed(0)
    result = train(recipe, TrainConfig(
        output=tmp_path / 'run', resolution=((8, 25),), batch_size=8, lr=3e-3, min_lr=1e-8, warmup=0.3,
        weight_decay=0.01, ema_decay=0., schedule='onecycle', validate_every=25, progress=False, device='cpu'))
    assert result.metrics['skill'] > 50 and result.folder.name == 'predformer_tiny.wave'
    pipe = vishub.pipeline(model=f'local-dir:{result.folder}')
    assert pipe.task == 'video_prediction' and not pipe.picture
    told = json.loads((result.folder / 'metrics.json').read_text())
    assert told['data'] == 'a wave' and told['num_test'] == 9
    # the stored figures are those of the stored weights, in the data's own unit
    readme = (result.folder / 'README.md').read_text()
    assert "vishub.pipeline('video_prediction', 'predformer_tiny.wave')" in readme
    assert 'classes' not in readme and 'means over pixels' in readme
    assert 'on the same data' in readme  # the baselines had no training
    assert all((result.folder / name).stat().st_size for name in ('prediction.png', 'horizon.png'))
    again = evaluate([f'local-dir:{result.folder}'], measurements)
    assert again['metrics'] == told['metrics']
    errors = [pipe(measurements.test.clip(i)).errors['predicted'] for i in range(9)]
    assert told['metrics']['mse'] == pytest.approx(np.mean(errors) / (8 * 16), rel=1e-3)
    assert told['metrics']['rmse'] == pytest.approx(told['metrics']['mse'] ** 0.5, rel=1e-3)
    copied = next(peer for peer in told['peers'] if peer['name'] == 'last frame copied')
    assert copied['metrics']['mse'] > 2 * told['metrics']['mse']
    assert len(copied['horizon']['mse']) == 4

    with pytest.raises(InputError, match='belong elsewhere'):
        update_card(result.folder, {**again, 'data': 'another'})
    update_card(result.folder, evaluate([f'local-dir:{result.folder}'], measurements, limit=5))
    assert json.loads((result.folder / 'metrics.json').read_text())['num_test'] == 5
    assert 'last frame copied' in (result.folder / 'README.md').read_text()


def test_command_line_trains_resumes_predicts_and_evaluates(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, '_VAL_CLIPS', 6)
    monkeypatch.setattr(data_module, '_TEST_CLIPS', 12)
    run = CliRunner()

    def call(*words):
        result = run.invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    words = ['train', 'video_prediction', '--model', 'predformer_tiny', '--data', digits, '--output', tmp_path / 'run',
             '--resolution', '32:2', '--num-clips', 16, '--batch-size', 8, '--device', 'cpu', '--no-progress',
             *(f'--model-arg={name}={value}' for name, value in SMALL.items())]
    call(*words)
    folder = tmp_path / 'run' / 'predformer_tiny.moving_mnist'
    told = json.loads((folder / 'metrics.json').read_text())
    assert told['num_test'] == 12 and told['training']['recipe']['schedule'] == 'onecycle'
    assert told['training']['recipe']['lr'] == 1e-3 and told['training']['recipe']['weight_decay'] == 0.01
    assert 'weights and figures' in call(*words)  # nothing left to do

    report = json.loads(call(
        'evaluate', folder, '--data', digits, '--limit', 5, '--json', '--output', tmp_path / 'eval', '--device', 'cpu'))
    assert report['num_test'] == 5 and [peer['name'] for peer in report['peers']][0] == 'last frame copied'
    assert (tmp_path / 'eval' / 'horizon.png').stat().st_size > 0
    assert json.loads((tmp_path / 'eval' / 'evaluation.json').read_text()) == report

    np.save(tmp_path / 'clip.npy', np.zeros((20, 32, 32), np.uint8))
    results = json.loads(call(
        'predict', f'local-dir:{folder}', tmp_path / 'clip.npy', '--option', 'horizon=11', '--json',
        '--output', tmp_path / 'out'))
    assert results[0]['num_predicted'] == 11
    assert sorted(path.suffix for path in (tmp_path / 'out').iterdir()) == ['.gif', '.json', '.npy', '.png']


def test_evaluate_refuses_what_cannot_be_compared(measurements):
    import timm
    small = timm.create_model('predformer_tiny', **SMALL)
    with pytest.raises(InputError, match='takes 8 frames of 1 x 32 x 32'):
        evaluate([small], measurements)
    with pytest.raises(InputError, match='two models are called'):
        evaluate([small, small], measurements)
    with pytest.raises(InputError, match='predicts no frames'):
        VideoPredictionRecipe('favit_b2', measurements)
    with pytest.raises(InputError, match='the model takes 8'):
        VideoPredictionRecipe('predformer_tiny', measurements)


def test_report_without_horizon_of_a_peer_is_drawn(tmp_path):
    report = {
        'model': 'a', 'data': 'd', 'report': {'scale': 'sum', 'horizon': {'mse': [1., 2.]}},
        'peers': [{'name': 'b', 'metrics': {'mse': 2.}}]}
    assert all(path.stat().st_size for path in save_evaluation(report, tmp_path))
