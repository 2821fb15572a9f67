"""benchmarks/linear_attention.py: that its contenders compute the same, and how its memory grows."""
import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module('linear_attention')
    for name in {'linear_attention', 'memory', 'timing'} & set(sys.modules):
        del sys.modules[name]


@torch.no_grad()
def test_plain_attention_is_softmax_attention(benchmark):
    plain, fused = benchmark.PlainAttention(32, 4).eval(), benchmark.SoftmaxAttention(32, 4).eval()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(x), fused(x))


def test_memory_of_linear_attention_is_linear(benchmark):
    options = dict(width=16, heads=2, linear_heads=2, rounds=1, device='cpu', threads=1, plain_limit=1e9)
    few, many = (benchmark.measure_attention(tokens, **options) for tokens in (1024, 4096))
    grown = {name: many[name]['bytes'] / few[name]['bytes'] for name in few}
    assert grown[benchmark.LINEAR] < 4.5
    assert grown[benchmark.PLAIN] > 10
    assert '| 4,096 |' in benchmark.table([{'tokens': 4096, 'figures': many}])


def test_refuses_what_is_no_grid(benchmark):
    with pytest.raises(SystemExit, match='no square grid'):
        benchmark.grid_of(500)
