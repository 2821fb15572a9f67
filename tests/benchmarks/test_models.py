"""benchmarks/models.py and the turns it takes: arithmetic on known times, and one quick run from the command line."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of `benchmarks/` as `python benchmarks/<script>.py` would, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in {'models', 'timing'} & set(sys.modules):
        del sys.modules[name]


def test_turns_rotate_and_the_first_round_is_not_counted(benchmark):
    timing = benchmark('timing')
    calls = []

    def contender(name):
        calls.append(name)
        return float(len(calls))

    turns = []
    seconds = timing.take_turns({name: lambda name=name: contender(name) for name in 'abc'}, 2, turns.append)
    assert ''.join(calls) == 'abc' 'bca' 'cab' and turns == calls
    assert seconds == {'a': [6, 8], 'b': [4, 9], 'c': [5, 7]}
    assert timing.ratios(seconds['a'], seconds['b']) == [6 / 4, 8 / 9]
    for wrong in (({}, 1), ({'a': lambda: 0.}, 0)):
        with pytest.raises(ValueError, match='at least one'):
            timing.take_turns(*wrong)


def test_timer_reads_the_clock_it_names(benchmark, monkeypatch):
    timing = benchmark('timing')
    ticks = {'process_time': iter([1., 1.5]), 'perf_counter': iter([10., 13.])}
    for name, values in ticks.items():
        monkeypatch.setattr(timing.time, name, lambda values=values: next(values))
    assert timing.timer(lambda: None, threads=1)() == 0.5 and timing.clock_name() == 'CPU time of one thread'
    assert timing.timer(lambda: None, threads=2)() == 3 and timing.clock_name('cpu', 2) == 'wall time'


def test_rows_from_known_times(benchmark):
    models = benchmark('models')
    facts = {
        'resnet50': dict(params=20, macs=4_000_000_000, input=[3, 224, 224], memory={'fp32': 2**21}),
        'favit_b2': dict(params=10, macs=2_000_000_000, input=[3, 224, 224], memory={'fp32': None}),
    }
    # The machine is ten times slower in the last round: a ratio of medians would differ from the median ratio.
    seconds = {
        'resnet50 fp32 8': [2., 4., 40.], 'resnet50 fp32 1': [1., 1., 10.],
        'favit_b2 fp32 8': [1., 8., 10.], 'favit_b2 fp32 1': [.5, .25, 20.],
    }
    ours, reference = models.result_rows(facts, seconds, ['fp32'], 8)  # by rising MACs
    assert (ours['model'], ours['family'], reference['family']) == ('favit_b2', 'favit', 'peer')
    assert ours['modes']['fp32'] == dict(
        throughput=1., throughput_ratio=2., latency_ms=500., latency_ratio=.5, memory=None)
    assert reference['modes']['fp32'] == dict(
        throughput=2., throughput_ratio=1., latency_ms=1000., latency_ratio=1., memory=2**21)
    lines = models.table([ours, reference], 8).splitlines()
    assert lines[2] == '| **favit_b2** | 0.0 | 2.00 | 1.0 | 2.00 | 500.0 | 0.50 | – |'
    assert lines[3] == '| resnet50 | 0.0 | 4.00 | 2.0 | 1.00 | 1000.0 | 1.00 | 2 |'


def test_defaults_are_the_catalogue_at_224_and_the_peers(benchmark):
    models = benchmark('models')
    names = models.default_models()
    assert {'favit_b3', 'fcaformer_dense_l2', 'fmvit_large', 'nextvit_small', 'resnet101'} <= set(names)
    assert not {'favit_small64', 'fmvit_nano', 'nvit'} & set(names) and len(set(names)) == len(names)


def test_deployed_form_has_its_branches_merged(benchmark):
    models = benchmark('models')
    model = models.deployed('fmvit_nano')
    training_form = sum(p.numel() for p in models.timm.create_model('fmvit_nano').parameters())
    assert not model.training and sum(p.numel() for p in model.parameters()) < training_form
    x = models.example(model, 2, 'cpu', models.CUDA_MODES[2])
    assert x.shape == (2, 3, 64, 64) and x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_labels_do_not_overlap(benchmark):
    models = benchmark('models')
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6))
    axis = figure.subplots()
    points = [(1 + 0.01 * (i % 3), 1 + 0.01 * (i // 3)) for i in range(9)]
    axis.scatter(*zip(*points), label='nine')
    axis.set(xlim=(0.5, 1.5), ylim=(0.5, 1.5))
    axis.legend()
    models.place_labels(axis, points, [f'model_number_{i}' for i in range(9)], ['k'] * 9)
    boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(a.contains(*axis.transData.transform(point)) for a in boxes for point in points)


@pytest.mark.parametrize('arguments, message', [
    (['--rounds', '0'], 'must be at least 1'),
    (['--models', 'favit_b9'], "neither vishub nor timm has a model 'favit_b9'"),
    (['--device', 'tpu'], '--device must be'),
    pytest.param(['--device', 'cuda'], 'no CUDA device', marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason='there is a CUDA device')),
])
def test_wrong_arguments_are_refused(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        benchmark('models').main(arguments)
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_quick_run_writes_table_data_and_plot(tmp_path):
    words = ['--models', 'fmvit_nano', 'vit_mini_patch2_28', '--rounds', '1', '--batch-size', '2', '--threads', '1']
    done = subprocess.run(
        [sys.executable, FOLDER / 'models.py', *words, '--output', tmp_path], capture_output=True, text=True,
        env={**os.environ, 'HF_HUB_OFFLINE': '1'}, timeout=300)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / 'models_cpu.json').read_text())
    assert data['setting']['rounds'] == 1 and data['setting']['batch_size'] == 2
    rows = {row['model']: row for row in data['results']}
    assert set(rows) == {'resnet50', 'fmvit_nano', 'vit_mini_patch2_28'}
    assert rows['resnet50']['params'] == 25_557_032 and 4.0e9 < rows['resnet50']['macs'] < 4.2e9
    reference = rows['resnet50']['modes']['fp32']
    for row in rows.values():
        figures = row['modes']['fp32']
        # of one round, a ratio is that of the figures; files hold three decimals
        speed, slowness = (figures[name] / reference[name] for name in ('throughput', 'latency_ms'))
        assert speed > 0 and figures['throughput_ratio'] == pytest.approx(speed, rel=0.01)
        assert slowness > 0 and figures['latency_ratio'] == pytest.approx(slowness, abs=0.002)
        if sys.platform == 'linux':
            assert figures['memory'] > 4 * row['params']  # at least its own weights
    page = (tmp_path / 'models_cpu.md').read_text()
    assert done.stdout.splitlines()[0] in page and '![' in page and '| **fmvit_nano** |' in page
    assert (tmp_path / 'models_cpu.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ['.json', '.md', '.png']
