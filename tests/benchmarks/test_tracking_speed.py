"""benchmarks/tracking.py: what it compares is the same network, and one very short run."""
import importlib
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

FOLDER = Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def tracking(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module('tracking')
    for name in {'timing', 'tracking'} & set(sys.modules):
        del sys.modules[name]


def test_with_and_without_cache_are_the_same_network(tracking):
    model = timm.create_model('bactrack_tiny').eval()
    torch.manual_seed(0)
    calls = tracking.contenders(model, [2], 'cpu')
    assert set(calls) == {'resnet50 features', 'cached 2', 'joint 2', 'update 2'}
    torch.testing.assert_close(calls['cached 2']().logits, calls['joint 2']().logits, rtol=0, atol=1e-5)
    assert calls['update 2']().tokens.shape == (1, 2, 36, 96)


def test_a_short_run(tracking, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, 'argv', [
        'tracking.py', '--templates', '1', '2', '--rounds', '1', '--threads', '1', '--output', str(tmp_path)])
    try:
        tracking.main()
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / 'tracking_cpu.json').read_text(encoding='utf-8'))
    assert [row['templates'] for row in content['rows']] == [1, 2]
    assert all(row['fps_cached'] > 0 and row['num_params'] == 523_975 for row in content['rows'])
    assert 'BACTrack-style' in (tmp_path / 'tracking_cpu.md').read_text(encoding='utf-8')
    assert 'written' in capsys.readouterr().out
